"""The page of ``cloudckpt ui``: runs to look at in a browser, served on loopback, from files of this package alone.

``reading`` asks the store, ``documents`` says what of it the page is given, ``site`` decides what a request is answered
with, ``server`` carries that. Nothing here can write to a store.
"""
