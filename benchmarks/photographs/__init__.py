"""Sets of crops of the photographs in Debian's wallpaper packages, with whole photographs held out.

    python -m benchmarks.photographs --output FOLDER                 # 64, 128 and 256 px
    python -m benchmarks.photographs --output FOLDER --side 64 --packages DEBS

Writes FOLDER/SIDE/train and FOLDER/SIDE/held_out, shard sets for data_pipelines.ShardDataset, and
FOLDER/photographs.json: packages and their versions, the photographs of both sets, and how many
pictures were dropped, by reason. PACKAGES in packages.py lists the packages and their licences;
/usr/share/doc/PACKAGE/copyright of each package has those of each file.

Equal packages, options and library versions give equal shards. The split is by photograph, never by
crop.
"""
