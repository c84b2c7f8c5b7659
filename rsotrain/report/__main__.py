from rsotrain.report.cli import main

main()
