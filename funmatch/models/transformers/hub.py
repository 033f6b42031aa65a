"""Fetches networks of transformers from the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import errors, hf_hub_download, snapshot_download

from funmatch.errors import InputError, first_line
from funmatch.models.names import HUB
from funmatch.models.timm_models import go_offline_if_unreachable, offline_message
from funmatch.models.transformers.config import read_entries
from funmatch.models.transformers.processor import FILES as PROCESSOR_FILES

CONFIG = "config.json"
WEIGHTS = (("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"), ("pytorch_model*.bin*",))
"""Patterns of the files of weights; the second only where a repository has none of the first."""


def hub_folder(name: str, more: tuple[str, ...] = ()) -> Path | None:
    """Returns the folder of a network of transformers on the Hub, fetched once; None if it is in timm's layout.

    Args:
        name: `hf-hub:user/model`, with `@revision` after it or without.
        more: patterns of further files that are fetched.

    Raises:
        InputError: there is no such repository, access to it is not granted, or the Hub cannot be reached.
    """
    repository, _, revision = name.removeprefix(HUB).partition("@")
    go_offline_if_unreachable()
    try:
        config = Path(hf_hub_download(repository, CONFIG, revision=revision or None))
        if read_entries(config) is None:
            return None
        files = (CONFIG, *PROCESSOR_FILES, *more)
        for patterns in WEIGHTS:
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*files, *patterns]))
            if any(next(folder.glob(pattern), None) for pattern in patterns):
                return folder
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} asks for its conditions to be accepted; accept them on its page, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"the Hugging Face Hub has no model {repository}, or you may not see it; check the name, or log in with "
            "`hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(offline_message(name, error)) from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"{name} has no {CONFIG}, so it is neither timm's nor transformers'") from error
    except errors.HFValidationError as error:
        raise InputError(f"{name} is not the name of a model on the Hub ({first_line(error)})") from error
    except Exception as error:  # clients of the network fail in many ways
        raise InputError(offline_message(name, error)) from error
    raise InputError(f"{name} has no weights in safetensors or pytorch_model.bin")
