"""A small procedural world in which identity, scene and subject mask are known exactly.

``attributes`` says what exists in it, ``silhouettes`` and ``scenes`` how it looks, ``renderer`` draws it, ``captions``
describes it, ``oracle`` reads it back from pictures.
"""
