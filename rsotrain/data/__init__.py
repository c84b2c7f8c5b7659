"""Documents -> tokens -> packed sequences -> their order. ``build.build_data`` puts the parts together."""
