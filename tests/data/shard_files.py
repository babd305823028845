"""Little shards for tests: picture i is one colour that tells i, its caption is "picture i"."""

import io
import json
import tarfile

from PIL import Image


def picture(i, size=(24, 18), kind="JPEG"):
    """Encoded; a frame in another colour, so that crops differ."""
    image = Image.new("RGB", size, (255 - i, i, 128))
    image.paste((10 * (i % 25), 255 - i, 0), (4, 4, size[0] - 4, size[1] - 4))
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return out.getvalue()


def members(numbers, caption="txt"):
    """Names and contents of a shard."""
    for i in numbers:
        yield f"{i:04d}.jpg", picture(i)
        if caption == "txt":
            yield f"{i:04d}.txt", f"picture {i}\n".encode()
        elif caption == "json":
            yield f"{i:04d}.json", json.dumps({"caption": f"picture {i}"}).encode()


def write_tar(path, contents):
    with tarfile.open(path, "w") as tar:
        for name, content in contents:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, count=3, each=10, **options):
    """shard-0.tar, ...; returns the pattern that names them."""
    for k in range(count):
        write_tar(folder / f"shard-{k}.tar", members(range(k * each, (k + 1) * each), **options))
    return str(folder / f"shard-{{0..{count - 1}}}.tar")
