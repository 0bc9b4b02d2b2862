"""Other libraries' plug-in points: their models run normkit's norms, and their code stays as it is.

- `patch_torch`: torch's own `rms_norm` and `layer_norm`, for every model of the process.
- `normkit.integrations.hf_kernels`: the package `kernels`, for models of transformers.
- `normkit.integrations.vllm`, `normkit.integrations.sglang`: the layers of vLLM and SGLang.
- `normkit.integrations.torchtitan`: overrides of torchtitan's configuration.
- `normkit.integrations.megatron`: specifications of Megatron-Core.
- `normkit.integrations.comfy_kitchen`: a backend of comfy-kitchen, the kernels of ComfyUI.

Nothing here is imported with normkit, and importing it changes nothing: each has to be called.
docs/integrations.md says where each is described, with what it does not cover.
"""

from normkit.integrations._torch import TorchPatch, patch_torch

__all__ = ["TorchPatch", "patch_torch"]
