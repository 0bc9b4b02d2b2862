"""The norms of other libraries, with their names, arguments and results, served by normkit.

- `normkit.compat.exllamav2_ext`: the norm functions of ExLlamaV2's C++ extension.
- `normkit.compat.exllamav2`: its modules ExLlamaV2RMSNorm, ExLlamaV2LayerNorm, ExLlamaV2HeadNorm.
- `normkit.compat.dropout_layer_norm`: flash-attention's extension of that name.
- `normkit.compat.lorax`: LoRAX's FastRMSNorm and FastLayerNorm.

Calls are as they were, and what was documented holds; defects are not copied.  Nothing here is
imported, and nothing is patched, unless it is asked for.
"""
