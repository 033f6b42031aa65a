"""Defines the description of an option: bounds, help group, what it can change, how it is typed."""

from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import Any


# A flag, not an enumeration: the temperature, for one, changes the student's loss and, sometimes, the teachers' mean.
class Changes(Flag):
    """What another value of an option can change. An option may change several of these at once."""

    PLACE = auto()
    """Where files lie, how they are kept and what is printed; nothing that is computed."""
    ARITHMETIC = auto()
    """How numbers are computed: results stay equal up to rounding."""
    STUDENT = auto()
    """The student's weights, or how it is evaluated."""
    VIEWS = auto()
    """The views that teachers and student are shown."""
    TEACHER = auto()
    """The teachers' outputs for a view."""
    DATA = auto()
    """The images or their labels."""


class OnResume(Enum):
    """What becomes of another value of an option when a run resumes."""

    UNCOMPARED = "not compared: it says where things lie or what is printed, or its content is compared instead"
    FREE = "accepted and recorded: no step of the training depends on it"
    ROUNDING = "accepted with --allow-rounding, and recorded: results stay equal up to rounding"
    DEVICE = "ROUNDING between devices of one type, RESULT between types"
    RESULT = "refused: it would be another run"


class Inherit(Enum):
    """Whether a run that goes on from the student of another (`distill RUN --quantize 8`) has the value of that run."""

    ALWAYS = "the value of the other run"
    WITH_TEACHER = "that of a run with a teacher; views for labels are not those of function matching"
    NEVER = "its own: the length and what follows from it, and what made the student that now brings its own weights"


class Group(Enum):
    """The headings of `--help`, in their order."""

    DATA = "Data"
    STUDENT = "Student"
    TEACHER = "Teacher"
    VIEWS = "Views"
    OPTIMIZER = "Optimizer"
    LOOP = "Loop"
    SEARCH = "Search"
    STUDY = "Study"
    MACHINE = "Machine"
    OUTPUT = "Output"


class Refers(Enum):
    """What the value of an option names, outside the record of a run."""

    DATA = "images"
    IMAGES = "image files, folders, patterns, or -"
    MODEL = "a model"
    MEASURED = "a model, an exported file, or none"
    WEIGHTS = "a file of weights, or none"
    CLASS_MAP = "a file of a class map, same-names, or by-number"
    CLASS_NAMES = "a file of class names, or data"
    TEMPLATES = "a file of templates, or the name of a set"
    FILE = "a file or folder"


@dataclass(frozen=True, kw_only=True)
class Opt:
    """The description of an option, beside its type, its default and its help text.

    Attributes:
        group: heading under which `--help` lists it.
        changes: what another value can change.
        at_least, at_most, above, below: bounds of its value, or of each of its values.
        usual: what is used where the default is None or empty: the value itself, or the rule in words.
        essential: whether `--help` shows it among the options that matter most.
        replaces: options of a recipe that are dropped when the user sets this one.
        searchable: whether `funmatch tune` may search it; None decides by `changes`.
        resume: what becomes of another value when a run resumes; None decides by `changes`.
        recipe: whether a recipe decides it; None decides by `changes`.
        study: whether a study file may set it.
        extends: whether a finished run may be resumed with another value, to make it longer.
        keeps: whether a run that resumes, or is extended, keeps its recorded value where none is given.
        inherit: whether a run that goes on from another has its value; None decides by `group`.
        refers: what its value, or each of its values, names; None for what a record holds whole.
        content: the fact of a run's record that holds the content of the files it names.
        flag: its name on the command line, where this is not the field's.
        aliases: other flags for it.
        positional: whether its value stands without a flag.
        metavar: what stands for its value in `--help`; None decides by its type.
        before: what runs did that were recorded before the option existed; None: its default.
        function: whether its value may be a function of the user, package.module:function.
        policy: whether a view policy may set it, for some of the images.
    """

    group: Group
    changes: Changes
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    usual: Any = None
    essential: bool = False
    replaces: tuple[str, ...] = ()
    searchable: bool | None = None
    resume: OnResume | None = None
    recipe: bool | None = None
    study: bool = True
    extends: bool = False
    keeps: bool = False
    inherit: Inherit | None = None
    refers: Refers | None = None
    content: str | None = None
    flag: str | None = None
    aliases: tuple[str, ...] = ()
    positional: bool = False
    metavar: str | None = None
    before: Any = None
    function: bool = False
    policy: bool = False

    @property
    def is_searchable(self) -> bool:
        """Whether a search may try several values: they make students that differ, and are evaluated alike."""
        # Options of DATA change the images that trials are compared on, PLACE changes no figure, and a difference in
        # rounding is not worth a trial.
        fixed = self.changes & (Changes.PLACE | Changes.ARITHMETIC | Changes.DATA)
        return not fixed if self.searchable is None else self.searchable

    @property
    def on_resume(self) -> OnResume:
        """What becomes of another value when a run resumes."""
        if self.resume is not None:
            return self.resume
        # An option that changes PLACE and anything else is compared, unless it says otherwise itself.
        usual = {Changes.PLACE: OnResume.UNCOMPARED, Changes.ARITHMETIC: OnResume.ROUNDING}
        return usual.get(self.changes, OnResume.RESULT)

    @property
    def inherited(self) -> Inherit:
        """Whether a run that goes on from another has its value."""
        if self.inherit is not None:
            return self.inherit
        return Inherit.WITH_TEACHER if self.group is Group.VIEWS else Inherit.ALWAYS

    @property
    def is_compared(self) -> bool:
        """Whether another value makes another run."""
        return self.on_resume not in (OnResume.UNCOMPARED, OnResume.FREE)

    @property
    def in_recipe(self) -> bool:
        """Whether a recipe decides the value, so that another one is an override."""
        # The same recipe on another machine is not an override.
        machine = self.changes == Changes.PLACE or Changes.ARITHMETIC in self.changes
        return not machine if self.recipe is None else self.recipe

    def problem(self, name: str, value: Any) -> str | None:
        """A sentence about a value, or one of several, that is out of bounds; None where all are in them."""
        for each in value if isinstance(value, tuple) else (value,):
            # A truth value is an integer to Python, but a switch has no bounds.
            if isinstance(each, int | float) and not isinstance(each, bool) and (bound := self._violated(each)):
                return f"{name} must {bound}, got {each}"
        return None

    def _violated(self, value: float) -> str | None:
        # By what holds, not by what fails: NaN fails every comparison, and so is out of any bounds.
        low = (self.at_least is None or value >= self.at_least) and (self.above is None or value > self.above)
        high = (self.at_most is None or value <= self.at_most) and (self.below is None or value < self.below)
        if low and high:
            return None
        bottom = self.above if self.at_least is None else self.at_least
        top = self.below if self.at_most is None else self.at_most
        # A share is understood best as an interval; of other numbers the bound that is violated says enough.
        if bottom is not None and top is not None and top <= 1:
            signs = "(" if self.at_least is None else "[", ")" if self.at_most is None else "]"
            return f"lie in {signs[0]}{bottom}, {top}{signs[1]}"
        # The lower bound first: of a value that is out of bounds only one sentence is written.
        if not low:
            return f"be at least {bottom:,}" if self.at_least is not None else f"be above {bottom:,}"
        return f"be at most {top:,}" if self.at_most is not None else f"be below {top:,}"
