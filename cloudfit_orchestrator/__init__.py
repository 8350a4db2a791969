"""CloudFIT orchestrator: Byzantine fault tolerant services on virtual machines over several clouds."""

__version__ = "0.1.0"
