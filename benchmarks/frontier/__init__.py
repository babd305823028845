"""The frontier: quality of a student of a ViT-S against the speed of an SO400M encoder of the same recipe."""
