"""Options of views that differ between the images of a batch: policies, of which each image draws one."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator

from funmatch.config.metadata import Changes, Group, Opt
from funmatch.config.options import Options
from funmatch.config.values import Numbers, converted, kind_of, type_problem
from funmatch.config.views import Views
from funmatch.errors import unknown

EXAMPLE = "mixup=0,randaugment=2 9"
CUT_ALIKE = (("inception", "whole"), ("mild", "squash"))
"""Crops that one batch may hold together: cut out of the image, or out of the image resized."""


def _as_policies(value: Any) -> Any:
    if isinstance(value, str):
        value = (value,)
    return tuple(map(_canonical, value)) if isinstance(value, list | tuple) else value


def _canonical(policy: Any) -> Any:
    """One spelling for each policy, so that equal ones compare equal when a run resumes."""
    if not isinstance(policy, str):
        return policy
    pairs = [each.partition("=") for each in policy.split(",")]
    return ",".join(
        f"{key.strip().replace('-', '_')}{equals}{' '.join(map(_number, value.split()))}"
        for key, equals, value in pairs
    )


def _number(word: str) -> str:
    try:
        return f"{float(word):.12g}"
    except ValueError:
        return word


Policies = Annotated[tuple[str, ...], BeforeValidator(_as_policies)]
"""One policy or several, each `key=value,key=value`."""


class MixedViews(Views):
    """How images become training views, for all alike or by policies."""

    # Not searchable: a search would need a notation for lists of lists.
    policy: Annotated[
        Policies,
        Opt(group=Group.VIEWS, changes=Changes.VIEWS, usual="one for all images", searchable=False,
            metavar="KEY=VALUE,… …"),
    ] = ()  # fmt: skip
    """View policies, of which each image of a batch draws one: some of mixup, mixup_lam, cutmix, randaugment, crop,
    crop_min_area and crop_ratio, which replace the run's for it, e.g. "mixup=1" "mixup=0,randaugment=2 9"."""
    policy_share: Annotated[
        Numbers, Opt(group=Group.VIEWS, changes=Changes.VIEWS, above=0, usual="equal", searchable=False)
    ] = ()
    """Shares of the policies in the images, one each, e.g. 2 1."""

    def variants(self) -> list[Self]:
        """The options as each policy sets them; only of policies that can be read."""
        parsed = [parse_policy(type(self), each) for each in self.policy]
        return [self.variant(values) for values, problems in parsed if not problems]

    def variant(self, values: dict[str, Any]) -> Self:
        """The options as a policy sets them.

        Args:
            values: of the options that it sets.
        """
        found = self.model_copy(update=values | {"policy": (), "policy_share": ()})
        # What is of the run, and has no effect in this policy, is meant for the others.
        fields = type(self).model_fields
        usual = {name: fields[name].default for name in found.idle() if name not in values}
        return found.model_copy(update=usual)

    @property
    def mixes_some(self) -> bool:
        variants = self.variants()
        # Of policies that cannot be read, which is reported, nothing is known.
        return any(each.mixes for each in variants) if variants and len(variants) == len(self.policy) else self.mixes

    def problems(self) -> list[str]:
        return self._policy_problems() + super().problems()

    def _policy_problems(self) -> list[str]:
        """Policies that cannot be read, that contradict the run or another, and shares that do not fit."""
        if not self.policy:
            return ["policy_share belongs to --policy"] if self.policy_share else []
        found, known, own = [], list[dict[str, Any]](), self.model_copy(update={"policy": (), "policy_share": ()})
        usual = own.problems()
        for text in self.policy:
            values, problems = parse_policy(type(self), text)
            if not problems:
                variant = self.variant(values)
                problems = [problem for name in values for problem in variant.value_problems(name)]
                problems = problems or [each for each in variant.problems() if each not in usual]
                problems = problems or self._crop_problems(variant)
                problems += ["it is given twice; give it once, with the sum of both shares"] * (values in known)
                known.append(values)
            found += [f"policy {text!r}: {problem}" for problem in problems]
        if len(self.policy) == 1:
            found.append("policy needs at least two policies; what holds for all images is set for the run")
        if len(self.policy_share) not in (0, len(self.policy)):
            found.append(
                f"policy_share has {len(self.policy_share)} values for {len(self.policy)} policies; give one each, in "
                "their order"
            )
        return found

    def _crop_problems(self, variant: "MixedViews") -> list[str]:
        alike = next((each for each in CUT_ALIKE if self.cropped in each), (self.cropped,))
        if variant.cropped in alike:
            return []
        return [
            f"{variant.cropped} crops need another resize than the run's {self.cropped} crops, and all images of a "
            f"batch are resized alike; use {' or '.join(alike)}"
        ]


def parse_policy(table: type[Options], text: str) -> tuple[dict[str, Any], list[str]]:
    """Parses a policy; returns the options that it sets, with their values, and what is wrong with it."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    allowed = table.where(lambda opt: opt.policy)
    for pair in text.split(","):
        word, equals, value = pair.partition("=")
        name = table.field_of(word)
        if not equals or not word or not value:
            problems.append(f"{pair!r} is not key=value; quote each policy as one word, e.g. {EXAMPLE!r}")
        elif name not in allowed:
            hint = f"{word} is an option of the whole run" if name else ""
            problems.append(str(unknown("option of a policy", word, allowed, hint=hint)))
        elif name in values:
            problems.append(f"{name} is set twice")
        else:
            values[name], wrong = _parse_value(table, name, value)
            problems += [f"{name}: {wrong}"] if wrong else []
    return values, problems


def _parse_value(table: type[Options], name: str, text: str) -> tuple[Any, str | None]:
    """Parses the value of an option in a policy; returns it, and what is wrong with it."""
    field = table.model_fields[name]
    kind = kind_of(field)
    # As `--help` calls the default of options that are off.
    if kind.optional and text == table.opt(name).usual == "off":
        return None, None
    words: list[Any] = text.split() if kind.choices else [_typed(word) for word in text.split()]
    value = words if kind.several or len(words) != 1 else words[0]
    problem = type_problem(field, value)
    return (None, problem) if problem else (converted(field, value), None)


def _typed(word: str) -> float | str:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
