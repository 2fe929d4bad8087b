"""Triton's own client, unchanged, against a real server."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from e2e_support import add_key
from PIL import Image
from support import encode, random_pixels

http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")

pytestmark = pytest.mark.e2e

PIXELS = random_pixels(2, seed=5)
FILES = np.array([encode(Image.fromarray(one), "PNG") for one in PIXELS], dtype=object)


@pytest.fixture(scope="module")
def client(server):
    with http.InferenceServerClient(server.url.removeprefix("http://")) as opened:
        yield opened


def given(values, datatype, **options):
    tensor = http.InferInput("image", list(values.shape), datatype)
    tensor.set_data_from_numpy(values, **options)
    return [tensor]


def test_it_sees_a_live_server_with_a_ready_model(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("dog")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("tiny")["inputs"][0]["shape"] == [-1, 8, 8, 3]
    assert client.get_model_config("tiny")["input"][0]["dims"] == [8, 8, 3]


@pytest.mark.parametrize("pressed", [None, "gzip", "deflate"])
def test_pixels_and_files_binary_and_in_json_give_the_same_bits(client, pressed):
    inputs = [given(PIXELS, "UINT8"), given(PIXELS, "UINT8", binary_data=False), given(FILES, "BYTES")]
    answers = [client.infer("tiny", one, request_compression_algorithm=pressed) for one in inputs]
    as_json = client.infer("tiny", inputs[0], outputs=[http.InferRequestedOutput("logits", binary_data=False)])

    assert len({one.as_numpy("logits").tobytes() for one in [*answers, as_json]}) == 1
    assert answers[0].as_numpy("logits").shape == (2, 3)


@pytest.mark.parametrize("binary_data", [True, False])
def test_classification_names_the_largest_logits(client, binary_data):
    logits = client.infer("tiny", given(FILES, "BYTES"), request_id="seven").as_numpy("logits")
    wanted = [http.InferRequestedOutput("logits", binary_data=binary_data, class_count=2)]

    answer = client.infer("tiny", given(FILES, "BYTES"), outputs=wanted, request_id="seven")

    assert answer.get_response()["id"] == "seven"
    for row, values in zip(answer.as_numpy("logits"), logits, strict=True):
        texts = [one.decode() if isinstance(one, bytes) else str(one) for one in row]
        found = [text.split(":") for text in texts]
        assert [int(index) for _, index, _ in found] == list(np.argsort(values)[::-1][:2])
        assert [np.float32(value) for value, _, _ in found] == sorted(values)[::-1][:2]
        assert {label for _, _, label in found} <= {"cat", "dog", "owl"}


def test_it_gets_the_reason_of_a_refusal(client):
    with pytest.raises(Exception, match="no model dog is served"):
        client.infer("dog", given(FILES, "BYTES"))


def test_requests_at_once_as_a_load_generator_sends_them(server):
    with http.InferenceServerClient(server.url.removeprefix("http://"), concurrency=8) as client:
        waiting = [client.async_infer("tiny", given(PIXELS, "UINT8")) for _ in range(64)]
        assert len({one.get_result().as_numpy("logits").tobytes() for one in waiting}) == 1


def test_it_reads_the_statistics(client):
    def asked() -> dict:
        (found,) = client.get_inference_statistics("tiny")["model_stats"]
        return found["inference_stats"]

    before = asked()
    client.infer("tiny", given(PIXELS, "UINT8"))

    assert "statistics" in client.get_server_metadata()["extensions"]
    assert asked()["success"]["count"] == before["success"]["count"] + 1
    assert asked()["queue"]["count"] == before["queue"]["count"] + len(PIXELS)


def test_it_is_told_plainly_what_is_not_supported(client):
    calls = [
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.unregister_system_shared_memory,
        lambda: client.register_system_shared_memory("one", "/one", 16),
        client.get_trace_settings,
        lambda: client.update_log_settings({"log_verbose_level": 1}),
    ]
    for call in calls:
        with pytest.raises(Exception, match=r"not supported|not changed by calls"):
            call()


def test_it_loads_unloads_and_lists_models_with_an_admin_key(start, models, tmp_path):
    keys = tmp_path / "keys"
    headers = {"X-API-Key": add_key(keys)}
    server = start("--models", str(models), "--api-keys-file", str(keys), "--public-predict")
    with http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        with pytest.raises(Exception, match="API key is needed"):
            client.unload_model("tiny")
        client.unload_model("tiny", headers=headers)
        unloaded = client.is_model_ready("tiny")
        (entry,) = client.get_model_repository_index(headers=headers)
        client.load_model("tiny", headers=headers)

        assert (unloaded, client.is_model_ready("tiny")) == (False, True)
        assert (entry["name"], entry["version"], entry["state"]) == ("tiny", "1", "UNAVAILABLE")
        assert client.infer("tiny", given(PIXELS, "UINT8")).as_numpy("logits").shape == (2, 3)


PERF_ANALYZER = shutil.which("perf_analyzer")


@pytest.mark.skipif(PERF_ANALYZER is None, reason="perf_analyzer is not on the path")
@pytest.mark.parametrize("flags", [(), ("-b", "4", "--async"), ("--input-tensor-format", "json")], ids=" ".join)
def test_perf_analyzer_measures_it_unchanged(server, flags):
    where = ("-u", server.url.removeprefix("http://"), "-i", "http", "-m", "tiny")
    what = ("--concurrency-range", "2", "-p", "300", "-s", "999", "-r", "9")  # any figure will do
    done = subprocess.run(
        [PERF_ANALYZER, *where, *what, *flags], capture_output=True, text=True, timeout=60, check=False
    )

    assert re.search(r"Throughput: [1-9]", done.stdout), done.stdout + done.stderr
    assert re.search(r"Successful request count: [1-9]", done.stdout), "it reads the server's statistics"
