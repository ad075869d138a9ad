"""The exceptions of HeteroRL. The command line prints the message, one line a problem, and exits with the class's code.

HeteroRLError
├── UserError            something that the user has to correct: exit code 2
│   ├── SpecError        the manifest; `problems` holds every one of them
│   ├── DataError        a data file or row
│   ├── ModelError       a model folder or name
│   └── RunFolderError   the run's folder: in use, of another spec, no space left
├── ExchangeError        something on the shared volume is not what the protocol says
│   ├── CorruptFile      sizes, checksums or contents do not fit the manifest
│   ├── UnknownProtocol  written by another version of HeteroRL; never taken for damage: exit code 2
│   └── CanaryMismatch   an engine computes other log-probabilities than the learner
├── SiteError            something is wrong with this node (GPU, disk, mount, memory, clock): exit code 3
├── Superseded           another process has taken this one's place; it leaves without writing: exit code 143
└── TrainingError        the learner cannot go on: the policy has diverged
    └── NotFinite        a step's loss or gradient; nothing was changed, another batch may do
"""

from __future__ import annotations

from heterorl.exit_codes import SITE_ERROR, TOLD_TO_GO, USER_ERROR


class HeteroRLError(Exception):
    """Base of all; `exit_code` is what a process that ends with it returns."""

    exit_code = 1


class UserError(HeteroRLError):
    """What was found, what was expected, what to do."""

    exit_code = USER_ERROR


class SpecError(UserError):
    """The manifest has problems; `str()` holds them all, one a line."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


class DataError(UserError):
    """A dataset cannot be used."""


class ModelError(UserError):
    """A model cannot be used."""


class RunFolderError(UserError):
    """The run's folder cannot be used."""


VOLUME_IN_USE = "VolumeInUse"
"""How a RunFolderError begins whose volume is another run's."""


class ExchangeError(HeteroRLError):
    """The shared volume does not hold what the protocol promises."""


class CorruptFile(ExchangeError):
    """A published file fails its checks."""


class UnknownProtocol(ExchangeError):
    """A file whose protocol or shape this version does not know. It is not damage: everything is kept as it is."""

    exit_code = USER_ERROR

    def __init__(self, what: str, found: str, known: str) -> None:
        super().__init__(
            f"{what} has {found}; this version of HeteroRL knows {known}. Nothing was changed: continue with the"
            " version that wrote it, or move it out of the run's folder to continue without it"
        )


class CanaryMismatch(ExchangeError):
    """The engine's log-probabilities of the canary differ from the learner's beyond tolerance."""


class SiteError(HeteroRLError):
    """This node cannot do the work; another one may."""

    exit_code = SITE_ERROR


class Superseded(HeteroRLError):
    """A newer incarnation of the learner, or a newer holder of the slot, has taken over: this process may not write.

    It ends with the exit code of a process that was told to go: nothing has failed, and nothing is charged.
    """

    exit_code = TOLD_TO_GO


class TrainingError(HeteroRLError):
    """The learner cannot go on."""


class NotFinite(TrainingError):
    """Loss or gradient of a step is not finite. Weights and optimizer are unchanged, the gradient is cleared."""
