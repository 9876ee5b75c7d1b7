"""Streams of features, metrics of whole sets, states that survive a kill: the same bits whatever the devices."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from diffjax.build import evaluation, feature_spaces, image_sets, streams
from diffjax.build.companions import TextEncoder
from diffjax.build.evaluation import Request
from diffjax.metrics import fid, inception_score, kid, prdc, protocol, references, stats
from diffjax.runtime import videos

COUNT, SIDE = 2300, 4  # more than two blocks of sums


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def real():
    return np.random.default_rng(1).integers(0, 200, (1100, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def space():
    """Random features with the outputs of Inception."""
    keys = jax.random.split(jax.random.key(0), 3)
    widths = {"pool": 6, "spatial": 4, "logits": 5}
    params = {
        name: jax.random.normal(key, (SIDE * SIDE * 3, width))
        for (name, width), key in zip(widths.items(), keys, strict=True)
    }

    def extract(params, x):
        flat = x.reshape(len(x), -1).astype(jnp.float32) / 127.5 - 1
        return {name: jnp.tanh(flat @ kernel / 4) for name, kernel in params.items()}

    return feature_spaces.FeatureSpace("inception", extract, params, widths, resize="none", weights_sha256="aa")


@pytest.fixture(scope="module")
def how():
    return streams.How(streams.local_mesh(1), batch_size=64, save_every_s=0.0)


def set_of(images, name="samples"):
    return image_sets.of_memory(images, name, {"test": name})


def of_space(space, images):
    return {name: np.asarray(value) for name, value in space.extract(space.params, images).items()}


# Streams ---------------------------------------------------------------------------------------------------------


def equal(a, b):
    assert a.moments.keys() == b.moments.keys() and a.kept.keys() == b.kept.keys() and a.digest == b.digest
    for key, moments in a.moments.items():
        assert moments.count == b.moments[key].count
        assert moments.mean.tobytes() == b.moments[key].mean.tobytes()
        assert moments.scatter.tobytes() == b.moments[key].scatter.tobytes()
    for key, kept in a.kept.items():
        assert kept.tobytes() == b.kept[key].tobytes()


def wants(space):
    return [
        streams.Want(space, ("pool", "spatial"), ("pool", "logits")),
        streams.Want(feature_spaces.load("pixels"), ("pool",)),
    ]


@pytest.fixture(scope="module")
def whole(space, images, how):
    return streams.collect(set_of(images), 0, range(COUNT), wants(space), how, None, digests=True)


@pytest.mark.fast
def test_moments_and_features_are_those_of_all_images_at_once(space, images, whole):
    found = of_space(space, images)
    for key in ("pool", "spatial"):
        moments = stats.moments(found[key])
        # float32 features of batches of another size, then sums in another order
        np.testing.assert_allclose(whole.moments[f"inception/{key}"].mean, moments.mean, atol=1e-6)
        np.testing.assert_allclose(whole.moments[f"inception/{key}"].covariance, moments.covariance, atol=1e-6)
    for key in ("pool", "logits"):
        np.testing.assert_allclose(whole.kept[f"inception/{key}"], found[key], atol=1e-6)
    np.testing.assert_allclose(whole.moments["pixels/pool"].covariance, fid.pixel_statistics(images)[1], atol=1e-12)
    assert whole.digest == protocol.set_sha256(protocol.digests(images))


def test_eight_devices_give_the_bits_of_one(space, images, how, whole):
    eight = how._replace(mesh=streams.local_mesh(8))
    assert eight.mesh.size == 8
    equal(streams.collect(set_of(images), 0, range(COUNT), wants(space), eight, None, digests=True), whole)


@pytest.mark.parametrize("killed_at", [1, 7, 20])
def test_what_was_killed_goes_on_to_the_same_bits(space, images, how, whole, tmp_path, killed_at):
    class Killed(Exception):
        pass

    reads = []

    def read(seed, ids):
        if len(reads) == killed_at:
            raise Killed
        reads.append(ids)
        return images[np.asarray(ids)]

    items = set_of(images)
    with pytest.raises(Killed):
        streams.collect(items._replace(read=read), 0, range(COUNT), wants(space), how, tmp_path, digests=True)
    before, again = len(reads), []
    items = items._replace(read=lambda seed, ids: again.append(ids) or images[np.asarray(ids)])
    equal(streams.collect(items, 0, range(COUNT), wants(space), how, tmp_path, digests=True), whole)
    assert before + len(again) == -(-COUNT // 64) and again[0][0] == before * 64
    again.clear()
    equal(streams.collect(items, 0, range(COUNT), wants(space), how, tmp_path, digests=True), whole)
    assert not again


def test_images_that_changed_are_read_again(space, images, how, tmp_path):
    items = set_of(images[:100])._replace(fingerprint=lambda ids: "before")
    asked = [streams.Want(space, ("pool",), ("pool",))]
    streams.collect(items, 0, range(100), asked, how, tmp_path)
    changed = set_of(images[100:200])._replace(fingerprint=lambda ids: "after")
    equal(
        streams.collect(changed, 0, range(100), asked, how, tmp_path),
        streams.collect(changed, 0, range(100), asked, how, None),
    )


def test_processes_share_whole_blocks():
    for count in (1, 999, 1000, 2300, 50_000):
        for processes in (1, 2, 3, 8):
            parts = [streams.share(count, process, processes) for process in range(processes)]
            assert [i for start, stop in parts for i in range(start, stop)] == list(range(count))
            assert all(start % stats.BLOCK == 0 for start, _ in parts)


# Metrics ---------------------------------------------------------------------------------------------------------

ALL = ("fid", "sfid", "fid_infinity", "kid", "is", "prdc")
OPTIONS = {"fid_infinity": {"smallest": 500}, "kid": {"num_subsets": 3, "subset_size": 200}, "prdc": {"k": 3}}


@pytest.fixture(scope="module")
def reference(space, real, how):
    return evaluation.make_reference(set_of(real, "real"), space, ALL, how, None)


def test_every_metric_is_that_of_its_module(space, images, reference, how, real):
    items = set_of(images[:2200])
    ranges = evaluation.seed_ranges(items, (0,), 2200)
    results = {
        r.protocol.metric: r for r in evaluation.evaluate(items, ranges, [Request(space, ALL, reference, OPTIONS)], how)
    }
    found, theirs = of_space(space, images[:2200]), of_space(space, real)
    own, other = ({key: stats.moments(value) for key, value in part.items()} for part in (found, theirs))

    def distance(key):
        return fid.frechet_distance(own[key].mean, own[key].covariance, other[key].mean, other[key].covariance)

    near = prdc.prdc(theirs["pool"], found["pool"][:1100], 3)
    expected = {
        "fid": distance("pool"),
        "sfid": distance("spatial"),
        "is": inception_score.inception_score(found["logits"]).mean,
        "kid": kid.kid(theirs["pool"], found["pool"], 3, 200).mean,
        **near._asdict(),
    }
    for name, value in expected.items():
        # float32 features of batches of another size
        assert results[name].value == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert set(results) == {*expected, "fid_infinity"} and np.isfinite(results["fid_infinity"].value)
    made = results["precision"].protocol
    assert (made.settings, made.num_samples, made.reference_count, made.weights_sha256) == (
        "k=3, equal=True",
        1100,
        1100,
        "aa",
    )
    assert (
        made.reference_sha256 == protocol.set_sha256(protocol.digests(real)) and results["is"].protocol.reference == ""
    )


def test_ranges_give_minimum_mean_and_spread(space, images, reference, how):
    items = set_of(images)
    ranges = evaluation.seed_ranges(items, (0, 1, 2), 700)
    assert [at.text for at in ranges] == ["images 0-699", "images 700-1399", "images 1400-2099"]
    (result,) = evaluation.evaluate(items, ranges, [Request(space, ("fid",), reference)], how)
    singles = [evaluation.evaluate(items, [at], [Request(space, ("fid",), reference)], how)[0].value for at in ranges]
    assert result.spread == (min(singles), np.mean(singles), max(singles)) and result.value == min(singles)
    assert result.protocol.statistic == "minimum of 3 seed ranges"


def test_values_that_are_there_are_not_measured_again(space, images, reference, how, tmp_path):
    items, request = set_of(images), Request(space, ("fid", "kid"), reference, {"kid": OPTIONS["kid"]})
    ranges = evaluation.seed_ranges(items, (0, 1), 500)
    first = evaluation.evaluate(items, ranges, [request], how, tmp_path)
    silent = items._replace(read=None)
    assert evaluation.evaluate(silent, ranges, [request], how, tmp_path) == first
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"] * 2  # the states are gone
    with pytest.raises(TypeError):  # another metric is another question
        evaluation.evaluate(silent, ranges, [request._replace(metrics=("fid", "is"), options={})], how, tmp_path)


def test_statistics_in_a_file_stand_for_the_data_they_were_made_of(space, images, reference, how, tmp_path):
    path = tmp_path / "real.npz"
    references.write(path, reference)
    opened = evaluation.open_reference(str(path), space)
    items = set_of(images[:300])
    ranges = evaluation.seed_ranges(items, (0,), 300)
    results = [
        evaluation.evaluate(items, ranges, [Request(space, ("fid",), found)], how)[0] for found in (reference, opened)
    ]
    protocol.check_comparable(results)
    assert results[0].value == results[1].value
    with pytest.raises(ValueError, match="another protocol: resize 'none', expected 'tf1 299'. Make it again"):
        evaluation.open_reference(str(path), space._replace(resize="tf1 299"))
    with pytest.raises(ValueError, match="mismatched reference size"):
        evaluation.open_reference(str(path), space._replace(widths={"pool": 7}))


def test_a_reference_goes_on_where_it_was(space, real, reference, how, tmp_path):
    items = set_of(real, "real")
    made = evaluation.make_reference(items, space, ALL, how, tmp_path)
    again = evaluation.make_reference(items._replace(read=None), space, ALL, how, tmp_path)
    for found in (made, again):
        assert found.mean.tobytes() == reference.mean.tobytes() and found.sha256 == reference.sha256


def test_videos_and_texts_have_their_metrics(space, images, how):
    frames = {"num_frames": 4, "name": "i3d"}
    video = space._replace(**frames, extract=lambda params, x: space.extract(params, x[:, 0]))
    samples, real = (set_of(part.reshape(50, 4, SIDE, SIDE, 3)) for part in (images[:200], images[200:400]))
    request = Request(video, ("fvd",), evaluation.make_reference(real, video, ("fvd",), how, None))
    (result,) = evaluation.evaluate(samples, evaluation.seed_ranges(samples, (0,), 0), [request], how)
    own, other = (stats.moments(of_space(space, part[::4])["pool"]) for part in (images[:200], images[200:400]))
    expected = fid.frechet_distance(own.mean, own.covariance, other.mean, other.covariance)
    # float32 features of batches of another size
    assert result.value == pytest.approx(expected, rel=1e-5) and result.protocol.features == "i3d"

    def encode(params, tokens):
        return {"pooled": tokens["length"] @ params}

    words = TextEncoder(
        tokenise=lambda texts: {"length": np.float32([[len(text), 1] for text in texts])},
        encode=encode,
        params=jnp.ones((2, 6)),
    )
    clip = space._replace(name="clip_b32", text=words)
    told = set_of(images[:70])._replace(texts=["a" * (i % 5) for i in range(70)])
    (result,) = evaluation.evaluate(told, evaluation.seed_ranges(told, (0,), 0), [Request(clip, ("clip_score",))], how)
    pool = of_space(space, images[:70])["pool"].astype(np.float64)
    cosines = pool.sum(1) / np.linalg.norm(pool, axis=1) / np.sqrt(6)  # every text is a multiple of (1, ..., 1)
    assert result.value == pytest.approx(max(100 * cosines.mean(), 0), rel=1e-5)
    with pytest.raises(ValueError, match="'clip_score' needs the texts of samples"):
        evaluation.check_request(Request(clip, ("clip_score",)), set_of(images))


# Sets ------------------------------------------------------------------------------------------------------------


def test_a_folder_with_sub_folders_and_an_adm_file_are_the_same_images(space, images, reference, how, tmp_path):
    folder = tmp_path / "pictures"
    for index in range(60):
        place = folder / f"{index // 30:05d}"
        place.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(images[index]).save(place / f"{index:06d}.png")
    np.savez(tmp_path / "adm.npz", arr_0=images[:60], arr_1=np.zeros(60))
    shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    request, values = Request(space, ("fid",), reference), []
    zipped, adm = str(tmp_path / "packed.zip"), str(tmp_path / "adm.npz")
    for items in (image_sets.of_folder(str(folder)), image_sets.of_folder(zipped), image_sets.of_arrays(adm)):
        (result,) = evaluation.evaluate(items, evaluation.seed_ranges(items, (0, 1, 2), 0), [request], how)
        values.append(result.value)
    assert len(set(values)) == 1 and result.protocol.num_samples == 60


def test_a_corrupt_picture_is_named_and_what_came_before_is_kept(space, images, reference, how, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(200):
        PIL.Image.fromarray(images[index]).save(folder / f"{index:06d}.png")
    items = image_sets.of_folder(str(folder))  # whole at first: what a look at headers would not find
    broken = folder / "000150.png"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    request, ranges = Request(space, ("fid",), reference), evaluation.seed_ranges(items, (0,), 0)
    slow = how._replace(save_every_s=1e9)
    with pytest.raises(ValueError, match="unreadable picture .*000150.png .* replace or remove it"):
        evaluation.evaluate(items, ranges, [request], slow, tmp_path / "state")
    broken.write_bytes(content)
    read = []
    counted = items._replace(read=lambda seed, ids: read.append(ids[0]) or items.read(seed, ids))
    (result,) = evaluation.evaluate(counted, ranges, [request], slow, tmp_path / "state")
    assert read == [128, 192]
    assert result.value == evaluation.evaluate(set_of(images[:200]), ranges, [request], how)[0].value


def test_videos_of_a_folder(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3), dtype=np.uint8) // 64 * 64
    for name, video in zip("ab", frames, strict=True):
        videos.save(tmp_path / f"{name}.gif", video, fps=5)
    items = image_sets.of_videos(str(tmp_path), 4)
    assert items.total == 2 and items.read(0, [0, 1]).shape == (2, 4, 16, 16, 3)
    with pytest.raises(ValueError, match=r"video .*a\.gif has 5 frames of .*expected at least 9"):
        image_sets.of_videos(str(tmp_path), 9).read(0, [0])
    (tmp_path / "b.gif").write_bytes(b"GIF89a nothing")
    with pytest.raises(ValueError, match=r"b\.gif"):
        items.read(0, [1])


def test_a_data_section_is_a_reference():
    data = ConfigDict({"name": "shapes", "num": 20, "image_size": 32, "channels": 3, "resize": True})
    items = image_sets.of_data(data)
    assert (items.total, items.name, items.shape) == (20, "shapes 32x32", (32, 32, 3))
    assert items.read(0, range(3)).shape == (3, 32, 32, 3)


# Refused ---------------------------------------------------------------------------------------------------------


def test_bad_images_are_refused_by_name(space, images, how):
    floats = images[:100].astype(np.float32) / 127.5 - 1
    floats[70, 1, 2, 0] = np.nan
    asked = [streams.Want(space, ("pool",))]
    with pytest.raises(ValueError, match="1 of 36 images hold a NaN or infinity, the first is sample 70"):
        streams.collect(set_of(floats), 0, range(100), asked, how, None)
    with pytest.raises(ValueError, match=r"takes images \(B, H, W, C\), uint8 or float, found .* int64"):
        feature_spaces.features(space, np.zeros((2, 4, 4, 3), np.int64))
    with pytest.raises(
        ValueError, match="takes images of shape .8, 8, 1., which its network was trained on, found .4, 4, 3."
    ):
        feature_spaces.features(space._replace(shape=(8, 8, 1)), images[:2])
    with pytest.raises(ValueError, match=r"values in 0 .. 255, expected about -1 .. 1: divide by 127.5"):
        feature_spaces.features(space, np.linspace(0, 255, 96, dtype=np.float32).reshape(2, 4, 4, 3))
    with pytest.raises(ValueError, match="takes videos of 16 frames, found 3"):
        feature_spaces.features(space._replace(num_frames=16), np.zeros((1, 3, 4, 4, 3), np.uint8))


def test_requests_are_checked_before_any_work(space, images, reference, how):
    items = set_of(images)._replace(read=None)
    ranges = evaluation.seed_ranges(items, (0,), 100)
    for request, message in (
        (Request(space, ("fidd",), reference), "unknown metric 'fidd'; did you mean 'fid'"),
        (Request(space, ("fid",)), "'fid' needs statistics of the reference, which is missing"),
        (
            Request(space, ("kid",), reference._replace(features=None)),
            "'kid' needs features of the reference, which real does not hold",
        ),
        (Request(space, ("sfid",), reference._replace(spatial=None)), "'sfid' needs spatial statistics"),
        (Request(space, ("frechet",), reference), "'frechet' is not defined on the features 'inception'"),
        (Request(space, ("prdc",), reference, {"prdc": {"kk": 3}}), "unknown option 'kk' of the metric 'prdc'"),
        (Request(space, ("fid",), reference, {"prdc": {"k": 3}}), "found some for .'prdc'."),
        (
            Request(space, ("fid",), reference._replace(mean=np.zeros(7))),
            "mismatched reference size: real has features of width 7",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.evaluate(items, ranges, [request], how)
    with pytest.raises(ValueError, match="has 2,300 images, fewer than the 5,000 asked for"):
        evaluation.seed_ranges(items, (0,), 5000)
    with pytest.raises(FileNotFoundError, match="diffjax.cli.prepare --stats"):
        evaluation.open_reference("nowhere.npz", space)


def test_bad_files_are_refused(tmp_path, images):
    with pytest.raises(FileNotFoundError, match="give a folder or file of images"):
        image_sets.of_folder(str(tmp_path / "absent"))
    np.savez(tmp_path / "floats.npz", arr_0=images[:3] / 255)
    with pytest.raises(ValueError, match="must hold images .* of uint8 as 'arr_0' or 'images', found .* float64"):
        image_sets.of_arrays(str(tmp_path / "floats.npz"))
    for index, side in enumerate((4, 8)):
        PIL.Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match=r"1\.png is 8x8, expected 4x4"):
        image_sets.of_folder(str(tmp_path))
    with pytest.raises(ValueError, match="takes no resize"):
        feature_spaces.load("pixels", resize="tf1")
    with pytest.raises(ValueError, match="needs weights, the run of a classifier"):
        feature_spaces.load("classifier")
    with pytest.raises(FileNotFoundError, match="get dinov2_vitl14_pretrain.pth"):
        feature_spaces.load("dinov2")
