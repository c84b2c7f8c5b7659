from rsotrain.cli.entry import main

if __name__ == "__main__":
    main()
