"""The shares in which a run draws its training images from several sources."""

from typing import Annotated

from funmatch.config.data import Images
from funmatch.config.metadata import Changes, Group, Opt
from funmatch.config.values import Numbers


class Sources(Images):
    """How the images of several sources are read and drawn."""

    # VIEWS too: the images of a step are others. Not searchable, as `policy_share`.
    share: Annotated[
        Numbers,
        Opt(group=Group.DATA, changes=Changes.STUDENT | Changes.VIEWS, above=0, searchable=False,
            usual="by their numbers of images"),
    ] = ()  # fmt: skip
    """Shares of the sources of --data in each batch, one each, e.g. 2 1: each source has epochs of its own, in which
    each of its images comes once."""

    def problems(self) -> list[str]:
        # The fields are declared by the tables that use this one.
        found, sources = [], len(getattr(self, "data", ()))
        if self.share and len(self.share) != sources:
            found.append(
                f"share has {len(self.share)} values for {sources} source{'s' * (sources != 1)} of --data; give one "
                "each, in their order"
            )
        elif len(self.share) == 1:
            found.append("share divides batches among several sources, and --data names one; omit it")
        if self.share and getattr(self, "sampling", "shuffled") == "balanced":
            found.append("sampling balanced draws all classes equally often, and share sources; give one of them")
        return found + super().problems()
