"""The table of the teachers, which distillation, evaluation and measurements share."""

from typing import Annotated, Literal

from funmatch.config.metadata import Changes, Group, Opt, Refers
from funmatch.config.options import Options
from funmatch.config.values import Integers, Names, Numbers, Pairs

TEACHER = Changes.TEACHER
CLIP = "clip:"
"""Prefix of the names of networks of image and text."""


class ByText(Options):
    """How class names make a classifier of a network of image and text."""

    classes_from: Annotated[
        str | None,
        Opt(group=Group.TEACHER, changes=TEACHER, refers=Refers.CLASS_NAMES, content="teacher", usual="none",
            metavar="FILE|data"),
    ] = None  # fmt: skip
    """For networks of image and text (clip:MODEL), the classes that they tell apart: a text file with a name a line; a
    JSON file with a list of names, or {"name": ["description", …], …}; or data, the data's own class names. Underscores
    are read as spaces."""
    templates: Annotated[
        str | None,
        Opt(group=Group.TEACHER, changes=TEACHER, refers=Refers.TEMPLATES, content="teacher",
            usual="openai-80; none for descriptions", metavar="openai-80|short|none|FILE"),
    ] = None  # fmt: skip
    """Sentences in which a class name is put, whose embeddings are averaged: the 80 that are usual for ImageNet, the 7
    of them that do best together, none, or a text file with one a line, {} where the name stands."""

    def problems(self) -> list[str]:
        found = []
        if self.classes_from is not None and not self._names_clip():
            found.append(f"classes_from is for networks of image and text ({CLIP}MODEL), and no model is one")
        if self.templates is not None and self.classes_from is None:
            found.append("templates belong to classes_from, which is not given")
        return found + super().problems()

    def _names_clip(self) -> bool:
        """Whether any option names a network of image and text."""
        named = [
            getattr(self, name) for name in type(self).where(lambda opt: opt.refers in (Refers.MODEL, Refers.MEASURED))
        ]
        return any(
            str(each).startswith(CLIP) for value in named for each in (value if isinstance(value, tuple) else [value])
        )


class Teaching(ByText):
    """The teachers, and how several become one."""

    teacher_weights: Annotated[
        Names,
        Opt(
            group=Group.TEACHER,
            changes=TEACHER,
            refers=Refers.WEIGHTS,
            content="teacher",
            usual="none",
            essential=True,
            metavar="PATH …",
        ),
    ] = ()
    """File with the weights (.safetensors, .pt or BiT .npz) of each teacher given by its timm name; `none` for one that
    brings its own. Its head decides the classes."""
    teacher_kwargs: Annotated[
        Pairs, Opt(group=Group.TEACHER, changes=TEACHER, usual="none", metavar="KEY=VALUE …")
    ] = ()
    """Arguments for the teacher's constructor; with several teachers, for each of them. weights_key=KEY chooses among
    several weights in a file, e.g. state_dict_ema."""
    teacher_side: Annotated[
        Integers,
        Opt(group=Group.TEACHER, changes=TEACHER, at_least=1, at_most=10**4, usual="the student's"),
    ] = ()
    """Image size of the teacher's views in pixels, one for all teachers or one each. The same crop is sampled at each
    size."""
    teacher_share: Annotated[Numbers, Opt(group=Group.TEACHER, changes=TEACHER, above=0, usual="equal")] = ()
    """Weights of several teachers in their mean, one each."""
    combine: Annotated[Literal["mean-logits", "mean-probabilities"], Opt(group=Group.TEACHER, changes=TEACHER)] = (
        "mean-logits"
    )
    """How several teachers become one: the mean of their logits, or of their probabilities at the temperature."""
    classes: Annotated[
        str | None,
        Opt(group=Group.TEACHER, changes=TEACHER, refers=Refers.CLASS_MAP, usual="the teacher's classes"),
    ] = None
    """For a teacher with other classes than the data: same-names matches classes by name; by-number sorts classes that
    are numbers by value, 2 before 10; a file map.json holds {"our class": "the teacher's", …}, by name, by number, or a
    list of these."""
    trust_class_order: Annotated[bool, Opt(group=Group.TEACHER, changes=TEACHER, searchable=False)] = False
    """Continue although the class names of a teacher (or of the evaluated model) differ from the data's, or are numbers
    that it seems to have in another order, assuming the same order."""

    def problems(self) -> list[str]:
        # The field is declared by the tables that use this one, each with its own default and help.
        names = getattr(self, "teacher", ())
        found, teachers = [], len(names)
        # Features are matched without any classes.
        needed = getattr(self, "matches_logits", True) and self.classes_from is None
        if needed and (nameless := [name for name in names if name.startswith(CLIP)]):
            found.append(f"teacher {nameless[0]} knows no classes by itself; name them with --classes-from names.txt")
        for name, values, single in (
            ("teacher_weights", self.teacher_weights, 0),
            ("teacher_side", self.teacher_side, 1),
            ("teacher_share", self.teacher_share, 0),
        ):
            # A single side may be for all teachers; a single file or weight would leave open whose it is.
            if teachers and len(values) not in (0, teachers, single):
                found.append(f"{name} has {len(values)} values for {teachers} teachers; give one each, in their order")
        return found + super().problems()
