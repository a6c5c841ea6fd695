"""`efficientllm export`: out of the run folder and onto the device; every export proves itself or leaves no file."""

import errno
from pathlib import Path

from efficientllm.delivery.proof import held_out_ids
from efficientllm.errors import ConfigError
from efficientllm.models.load import finished_model


def export(
    run: str,
    to: str,
    out: str,
    *,
    type: str | None,
    dtype: str | None,
    shard_size: str | None,
    overwrite: bool,
    trust_remote_code: bool,
) -> int:
    """Writes the model of a run, a folder or the hub in the format `to` (gguf, onnx, hf), and proves what it wrote.

    Args:
        type, dtype, shard_size: of gguf the weights' type; of hf the weights' dtype and a file's size.

    Raises:
        EfficientLLMError: anything the user can fix, or a failed proof; nothing is left behind then.
    """
    _check_flags(to, type=type, dtype=dtype, shard_size=shard_size)
    model, target = finished_model(run, "export"), Path(out).expanduser()
    ids = held_out_ids(Path(run).expanduser())
    try:
        if to == "gguf":
            from efficientllm.delivery.gguf.convert import export_gguf

            export_gguf(model, str(type), target, ids=ids, overwrite=overwrite, trust_remote_code=trust_remote_code)
        elif to == "onnx":
            from efficientllm.delivery.onnx_export import export_onnx

            export_onnx(model, target, ids=ids, overwrite=overwrite, trust_remote_code=trust_remote_code)
        else:
            from efficientllm.delivery.huggingface import export_folder

            export_folder(
                model,
                target,
                dtype=str(dtype),
                shard_size=shard_size,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
            )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ConfigError(f"--out {out}: no space left on its disk; free up space or choose another disk") from None
    return 0


def _check_flags(to: str, **given: str | None) -> None:
    """Raises ConfigError for a flag that the format has not, or lacks."""
    takes = {"gguf": ("type",), "onnx": (), "hf": ("dtype", "shard_size")}[to]
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if value is not None and name not in takes:
            raise ConfigError(f"{flag} {value} does not apply to --to {to}; remove it")
        if value is None and name in takes and name != "shard_size":
            raise ConfigError(f"{flag} is missing; --to {to} needs it")
