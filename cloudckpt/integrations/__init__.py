"""One small file for each trainer that writes its checkpoints itself; each is imported by its own name only.

``hf`` (transformers), ``lightning``, ``accelerate``, ``ignite``, ``ray``, ``forgather``; and ``listeners`` and
``opentelemetry`` for those who want to know what happens.
"""
