"""Tokenizers, judged by the generators that are trained on their latents.

    python -m benchmarks.downstream symmetry --images FOLDER
    python -m benchmarks.downstream prediction --images FOLDER

FOLDER holds the four idx files of Fashion-MNIST, gzipped or not (Debian: dataset-fashion-mnist).

`symmetry` compares ways to use the symmetry of images in training a generator (`symmetry.ARMS`), on
images in any pose, each turned once by a drawn element of the group, and on upright ones.
`prediction` trains tokenizers of many kinds (`prediction.TOKENIZERS`) with a generator each, and
correlates what the report card says of the latents with the FID of the samples.

All models train with `efae.training.loop` on one thread. The cost of a step, measured first, sets
the number of steps, so that every generator takes equal CPU time. Samples are compared with
held-out images in the features of a classifier of these, as jobs/generate.py compare does it.
Finished runs are kept in benchmarks/results/downstream-STUDY.json, and models and latents in
--folder, so an interrupted study resumes; both print a table at the end.
"""
