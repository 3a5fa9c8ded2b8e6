"""`python -m serve_app COMMAND` is the command line without the installed script."""

from serve_app.cli import main

if __name__ == "__main__":
    main()
