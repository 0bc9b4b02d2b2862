"""Makes src/normkit/_families.json: what the norms of every architecture compute, measured.

`make families` builds each architecture of transformers and diffusers on the meta device and asks
the recogniser of each module that may be a norm; see docs/developing.md.
"""
