"""One policy that is trained many times from the same weights: in `gapo study` and in `gapo audit`.

Batch and forward are these commands' own, beside those of `gapo.adapters.hf`: pairs are padded on the right, and the
model computes under the causal mask alone. A study is a thousand runs of seconds, which this makes shorter.
"""
