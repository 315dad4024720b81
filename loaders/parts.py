"""Optional parts: whether they are here, and why not."""

import importlib

import torch


def import_part(module: str) -> None:
    """Imports an optional part. FFCV sets PyTorch's threads to 1 for the whole process; they are set back. torchcodec loads
    FFmpeg's libraries only when it is used; here it is."""
    threads = torch.get_num_threads()
    try:
        part = importlib.import_module(module)
    finally:
        torch.set_num_threads(threads)
    if module == "torchcodec.decoders":
        try:
            part.VideoDecoder(b"no video")
        except Exception as error:
            if "libtorchcodec" in str(error):
                raise ImportError("FFmpeg's libraries are not here, or PyTorch is of another version") from None


def missing_part(module: str) -> str:
    """Why a module cannot be imported; empty if it can."""
    try:
        import_part(module)
    except Exception as error:  # a broken installation can raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return ""
