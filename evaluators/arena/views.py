"""Pictures as a page may have them: decoded here and packed again inside the page's own text.

So a browser is given no path and no address of a picture, nothing of the file but its pixels (a name in its metadata
would say which model drew it), and nothing has to be served from a folder.
"""

from __future__ import annotations

import base64
import functools
import io

from PIL import Image

from mmalign.errors import UserError
from mmalign.media import Media

LARGEST = 2048  # pixels on the longer side; larger pictures are reduced for looking at


@functools.lru_cache(maxsize=16)
def packed(media: Media) -> str:
    """The picture as a `data:` address, without loss up to `LARGEST`.

    Raises:
        UserError: the file is missing, damaged or too large, or not the one that was listed.
    """
    loaded = media.loaded()
    if loaded.digest != media.digest:
        raise UserError("the picture has changed since it was listed", place=media.where)
    picture = loaded.open()
    picture.info.clear()
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
