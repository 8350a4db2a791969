"""`python -m cloudfit_orchestrator.cli`: the `cloudfit` command where it is not installed."""

from cloudfit_orchestrator.cli.main import main

if __name__ == "__main__":
    main()
