"""Uploads a finished model to the Hugging Face hub."""

from pathlib import Path

from efficientllm.errors import ConfigError
from efficientllm.models.load import finished_model


def push(run: str, repo: str, *, private: bool) -> int:
    """Uploads RUN/model, or a plain model folder, to the hub repository `repo` (made if it is not there).

    Raises:
        ConfigError: no such folder, an unfinished run, no token, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    folder = Path(finished_model(run, "push"))
    if not folder.is_dir():
        raise ConfigError(f"push {run}: no such folder; name a run folder or a model folder")
    if get_token() is None:
        raise ConfigError(f"push to {repo}: no hub token found; run 'hf auth login' or set HF_TOKEN")
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload by efficientllm")
    except Exception as error:  # the hub's errors share no type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"push to {repo}: the hub refused it or could not be reached ({reason}); check name, token and connection"
        ) from None
    print(url)
    return 0
