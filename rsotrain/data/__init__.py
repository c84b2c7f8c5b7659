"""Documents -> tokens -> sequences -> their order. ``build.build_data`` puts the parts together."""
