"""The one error that users are meant to see: it names the value, the rule and the cure."""

from typing import ClassVar


class UserError(ValueError):
    """Something the user gave cannot be used. The CLI prints it on one line and exits with `exit_code`.

    Args:
        value: what was given, with its name (`--input /tmp/x`).
        rule: what it breaks (`does not exist`).
        cure: what to do about it (`give a folder, a manifest or a tar`).
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, value: str, rule: str, cure: str) -> None:
        self.value, self.rule, self.cure = value, rule, cure
        super().__init__(" ".join(f"{value}: {rule}; {cure}".split()))

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str]]:
        """Errors cross process borders by pickle, which would otherwise pass one argument."""
        return type(self), (self.value, self.rule, self.cure)


class RunBroken(UserError):
    """The machines failed, not the user; what is written is kept, and the same command goes on."""

    exit_code: ClassVar[int] = 1


class TooManyFailed(UserError):
    """More rows failed than the run allows; what is written is kept."""

    exit_code: ClassVar[int] = 3


def one_line(error: BaseException) -> str:
    """What an error says, or its kind where it says nothing, on one line of 500 characters at most."""
    return " ".join((str(error) or type(error).__name__).split())[:500]
