"""Whether latents that flip and turn for free help the diffusion model that is trained on them.

    python -m benchmarks.downstream --images FOLDER

FOLDER holds the four idx files of Fashion-MNIST, gzipped or not (Debian: dataset-fashion-mnist).

A small rectified flow is trained on stored latents, for equal steps at an equal batch size, with
latents from an `exact` tokenizer or from a plain one that was trained for as long, and with one of
several ways to get more views of few images (`arms`). Its samples are decoded and compared with
held-out images in the features of a classifier that is trained here (`features`).

Two data sets are made of the images: "upright", as they are, where samples must be upright too and
the flow is told which view it sees (non-leaky augmentation, Karras et al. 2022, arXiv:2206.00364,
appendix F); and "any", where every image, the held-out ones too, is turned by one element drawn for
it once, as microscopy and satellite images are, and nothing is told.

Everything is a function of the seed. A seed stands for another training of the tokenizers, another
subset of images and another flow, so the spread is that of the whole. What is finished is kept in
--folder and not repeated. About 80 minutes on two quiet cores as it stands; see --seeds, --poses,
--arms, --sizes and --flow-steps for less.
"""
