"""What goes wrong in a simulated run, and how often. A profile is data; seeds choose the rest."""

from dataclasses import dataclass

from cloudfit_orchestrator.testing.network import Weather

_CALM = Weather()
_DROPS = Weather(drop=0.05)
_DELAYS = Weather(jitter_s=0.02, late=0.02, late_s=2.0)
_REORDERS = Weather(delay_s=0.0005, jitter_s=0.03, duplicate=0.1)
_STORM = Weather(drop=0.03, duplicate=0.05, jitter_s=0.01, late=0.01, late_s=1.5)


@dataclass(frozen=True, slots=True)
class Profile:
    """Rates are per virtual second of the group; 0 never."""

    weather: Weather = _CALM
    crashes: float = 0.0  # of some correct machine, which starts again
    boot_s: float = 0.3  # mean of how long it is off
    partitions: float = 0.0
    partition_s: float = 1.0
    byzantine: bool = False  # f machines are taken over from the beginning
    replacements: int = 0  # machines replaced by reconfiguration, one after the other
    mobile: bool = False  # after each replacement another machine is taken over
    trouble_s: float = 12.0  # virtual seconds of all this; then the network heals and all correct machines run
    clients: int = 3
    operations: int = 40  # of each client
    keys: int = 3


PROFILES: dict[str, Profile] = {
    "calm": Profile(),
    "drop": Profile(weather=_DROPS),
    "delay": Profile(weather=_DELAYS),
    "reorder": Profile(weather=_REORDERS),
    "crash": Profile(crashes=0.5),
    "partition": Profile(partitions=0.3),
    "byzantine": Profile(byzantine=True),
    "replace": Profile(replacements=2),
    "replace-crash": Profile(replacements=2, crashes=0.3, weather=_DROPS),
    "chaos": Profile(weather=_STORM, crashes=0.3, partitions=0.1, byzantine=True),
    "mobile": Profile(byzantine=True, replacements=3, mobile=True, trouble_s=18.0),
    "all": Profile(
        weather=_STORM, crashes=0.2, partitions=0.1, byzantine=True, replacements=3, mobile=True, trouble_s=18.0
    ),
}
