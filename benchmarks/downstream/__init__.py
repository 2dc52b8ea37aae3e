"""Effect of free flips and rotations of latents on the diffusion model trained on them.

    python -m benchmarks.downstream --images FOLDER

FOLDER holds the four idx files of Fashion-MNIST, gzipped or not (Debian: dataset-fashion-mnist).

A small rectified flow trains on stored latents, for equal steps at an equal batch size. The latents
are those of an `exact` tokenizer or of a plain one that trained for the same time, and each arm
(`arms`) augments the few images in a different way. The samples are decoded and compared with
held-out images in the features of a classifier that is trained here (`features`).

The images form two data sets. In "upright", they stay as they are; samples must be upright, too, so
the view conditions the flow (non-leaky augmentation, Karras et al. 2022, arXiv:2206.00364, appendix
F). In "any", every image, including held-out ones, is transformed once by a random element, as in
microscopy and satellite images, and the view does not condition the flow.

Everything is a function of the seed. Each seed trains other tokenizers and another flow on another
subset of images, so the spread covers the whole procedure. Finished parts are kept in --folder and
not repeated. The defaults take about 80 minutes on two idle cores; --seeds, --poses, --arms,
--sizes and --flow-steps reduce that.
"""
