"""Image sets whose label hangs on pixels far apart: Pathfinder, and pairs of images (IsSameClass).

Every image is drawn from a seed sequence of its own, made of the seed, the split and its number: the
same call gives the same images with any number of worker processes, and image 7 of ten is image 7 of ten
thousand. ``split="train"`` and ``split="test"`` of one seed share no image.

Pathfinder is described in ``tnreg.images.scene``. An IsSameClass image shows two small images ``distance``
pixels apart; the label says whether they are of one class (Razin, Maman and Cohen (2022),
arXiv:2201.11729). No file that is read can run code.

Example:
    >>> from tnreg import images
    >>> paths = images.pathfinder(8, length=3, size=32, matched=True, seed=1)
    >>> paths.images.shape, paths.images.dtype, paths.labels.tolist()
    ((8, 1, 32, 32), dtype('uint8'), [0, 1, 1, 1, 0, 0, 1, 0])
"""

from tnreg.images.sets import ImageSet, distance_only_accuracy, is_same_class, load, pathfinder

__all__ = ["ImageSet", "distance_only_accuracy", "is_same_class", "load", "pathfinder"]
