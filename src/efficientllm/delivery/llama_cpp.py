"""llama.cpp through llama-cpp-python, an extra: tokens, logits and its quantiser.

All of it is to run in a process of its own: llama.cpp stops the whole process at a model it did not expect.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficientllm.delivery.child import in_child
from efficientllm.errors import ConfigError, EfficientLLMError

EXTRA = "pip install 'efficientllm[llamacpp]' (it builds llama.cpp, which takes minutes)"


def is_installed() -> bool:
    return find_spec("llama_cpp") is not None


def require(what: str) -> None:
    """Raises ConfigError, naming the extra, if llama-cpp-python is not installed."""
    if not is_installed():
        raise ConfigError(f"{what} needs llama.cpp, which is not installed; run {EXTRA}")


def open_model(path: str, context: int, **settings: Any) -> Any:
    """Returns a llama_cpp.Llama on the CPU; call it in a child."""
    import llama_cpp

    rope = {"yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0}  # below 0: the file's own
    return llama_cpp.Llama(path, n_ctx=context, n_batch=context, n_ubatch=context, verbose=False, **rope, **settings)


def logits(path: str, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Returns (rows, tokens, vocabulary) logits, with keys and values cached in float32."""
    import llama_cpp

    float32 = llama_cpp.GGML_TYPE_F32
    model = open_model(path, len(rows[0]), logits_all=True, type_k=float32, type_v=float32)
    found = []
    for row in rows:
        model.reset()
        model.eval(list(row))
        found.append(np.array(model.scores[: len(row)], np.float32))
    return np.stack(found)


def tokens(path: str, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of texts, with what the tokenizer puts around them."""
    model = open_model(path, 32, vocab_only=True)
    return [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]


def quantize_file(source: Path, target: Path, file_type: int) -> None:
    """Rewrites a float32 file in another file type, by llama.cpp's own quantiser.

    Raises:
        EfficientLLMError: llama.cpp refuses.
    """
    if in_child("llama.cpp", _quantize, str(source), str(target), file_type):
        raise EfficientLLMError(f"{target}: llama.cpp's quantiser failed on it")


def _quantize(source: str, target: str, file_type: int) -> int:
    import ctypes

    import llama_cpp
    from llama_cpp._logger import set_verbose

    set_verbose(False)  # errors alone
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
