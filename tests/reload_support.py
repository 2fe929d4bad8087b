"""What tests of loading, swapping and watching share: a service on versions that can be told from each other."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest
from PIL import Image
from support import Engines, TinyModel, encode, random_pixels, running

from service.config import Settings

PIXELS = random_pixels(3, seed=61)
FILES = [encode(Image.fromarray(one), "PNG") for one in PIXELS]


def tiny(version: int) -> TinyModel:
    return TinyModel(seed=version)


@asynccontextmanager
async def service_on(repository, engines=None, **options):
    settings = Settings(models=repository, **{"device": "cpu", "lanes": 1, "spot_check_share": 0.0, **options})
    async with running(settings, engines or Engines()) as client:
        yield client, client._transport.app.state.service


async def ask(client, index: int = 0, **options):
    return await client.post("/predict?logits=true", content=FILES[index], **options)


def assert_own_answer(response, index: int = 0) -> int:
    """Check that the answer is that of the version which it names; return the version."""
    assert response.status_code == 200, response.text
    body = response.json()
    wanted = tiny(body["version"]).logits(PIXELS[index][np.newaxis])[0]
    assert body["predictions"][0]["logits"] == pytest.approx(wanted, abs=1e-3)
    return body["version"]


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 60))
