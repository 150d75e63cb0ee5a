"""Publishing: what goes to the Hub and what stays, what is refused, and going on after it."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from loopback_hub import READ_TOKEN, STRANGERS_TOKEN, File, find_card_errors
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import ViTImageProcessor

from model_cards.facts import TrainingRun
from model_cards.metadata import split_card
from model_cards.rendering import render_card, write_card
from modeling_vit_custom import ViTCustomForImageClassification
from trainers.hub import (
    Destination,
    RefusedError,
    add_tag,
    check_publishable,
    check_tag,
    collect_files,
    create_repo,
    upload,
)
from trainers.publish import main as publish


REPO = "someone/flowers"
DESTINATION = Destination(REPO)
RUN = TrainingRun(
    name="flowers",
    license="mit",
    label_names=list("abcde"),
    dataset_folder="images",
    teacher_folder="teacher",
    results={"accuracy": 0.5},
    evaluation_split="test",
    split_sizes={"test": 10},
    confusion_matrix=np.diag([2, 2, 2, 2, 2]),
    log_history=[{"loss": 1.0, "epoch": 1.0}],
    examples={"examples/1.png": "a"},
)
PUBLISHED = {
    "README.md",
    "all_results.json",
    "config.json",
    "configuration_vit_custom.py",
    "confusion_matrix.png",
    "examples/1.png",
    "kernels.py",
    "model.safetensors",
    "modeling_vit_custom.py",
    "preprocessor_config.json",
    "recipe.yaml",
    "run.json",
    "training_curves.png",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run leaves, with much that is nobody else's business."""
    folder = tmp_path_factory.mktemp("runs") / "flowers"
    model = tiny_model(ViTCustomForImageClassification, "vit")
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "examples").mkdir()
    recipe = "dataset: /home/me/images\nmodel: google/vit\nteacher: acme/plans/teacher\nrotation: 5\n"
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "all_results.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-2").mkdir()
    for name in ("model.safetensors", "optimizer.pt"):
        (folder / "checkpoint-2" / name).write_bytes(b"state")
    write_card(folder, RUN)
    shutil.copy(folder / "confusion_matrix.png", folder / "examples" / "1.png")
    write_card(folder, RUN)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(finished, tmp_path / "flowers")


def send(folder, destination=DESTINATION):
    create_repo(destination)
    return upload(folder, destination, "A version")


def contents(folder):
    """What is sent as it is."""
    files = collect_files(folder)
    return {name: files[name].read_bytes() for name in files.keys() - {"README.md", "recipe.yaml"}}


# ------------------------------------------------------------------------------------------------------ what is sent


def test_all_of_a_checkpoint_and_nothing_else_is_sent(hub, finished):
    send(finished)
    files = hub.files(REPO)
    assert files.keys() == PUBLISHED
    assert {name: files[name] for name in contents(finished)} == contents(finished)
    # That it was local is known of a folder that is not there any more.
    shown = {"dataset": "images", "model": "google/vit", "teacher": "teacher", "rotation": 5}
    assert yaml.safe_load(files["recipe.yaml"]) == shown
    card = files["README.md"].decode()
    assert find_card_errors(card) == []
    assert f'pipeline("image-classification", model="{REPO}", trust_remote_code=True)' in card
    assert not any(b"/home/me" in content for content in files.values())
    # What lies here says still how it is opened here.
    assert 'model="."' in (finished / "README.md").read_text(encoding="utf-8")


def test_only_changes_are_sent(hub, folder):
    first = send(folder)
    before = len(hub.requests)
    assert send(folder).oid == first.oid
    assert not [line for line in hub.requests[before:] if line.startswith("PUT") or "/commit/" in line]
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    before = len(hub.requests)
    assert send(folder).oid != first.oid
    puts = [line for line in hub.requests[before:] if line.startswith("PUT")]
    assert len(puts) == 1
    assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_large_files_go_in_parts(hub, finished):
    hub.chunk_size = 2**12
    send(finished)
    assert hub.files(REPO)["model.safetensors"] == (finished / "model.safetensors").read_bytes()
    assert sum(line.startswith("PUT") for line in hub.requests) > 10


def test_weights_of_another_number_of_files_leave(hub, folder):
    model = tiny_model(ViTCustomForImageClassification, "vit")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    check_publishable(folder)
    send(folder)
    shards = {name for name in hub.files(REPO) if name.startswith("model")} - {"modeling_vit_custom.py"}
    assert len(shards) > 2
    model.save_pretrained(folder)
    for name in shards:
        (folder / name).unlink(missing_ok=True)
    send(folder)
    assert hub.files(REPO).keys() == PUBLISHED


def test_what_people_wrote_on_the_hub_stays(hub, folder):
    send(folder)
    card = hub.files(REPO)["README.md"].decode()
    edited = card.replace("# flowers", "# Flowers of May\n\nOurs.").replace("license: mit", "license: apache-2.0")
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=REPO)
    HfApi().upload_file(path_or_fileobj=b"png", path_in_repo="garden.png", repo_id=REPO)
    write_card(folder, replace(RUN, base_model="someone/older", results={"accuracy": 0.75}))
    send(folder)
    after = hub.files(REPO)["README.md"].decode()
    metadata = split_card(after)[0]
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75
    assert metadata["base_model"] == "someone/older"
    assert "# Flowers of May\n\nOurs." in after
    assert "license: apache-2.0" in after
    assert "75.00%" in after
    assert "50.00%" not in after
    assert "garden.png" in hub.files(REPO)


def test_facts_that_no_longer_hold_leave_the_card(hub, folder):
    write_card(folder, replace(RUN, base_model="someone/older", license="mit", dataset="someone/data"))
    send(folder)
    write_card(folder, replace(RUN, from_scratch=True, license="apache-2.0"))
    send(folder)
    metadata = split_card(hub.files(REPO)["README.md"].decode())[0]
    assert not {"base_model", "base_model_relation", "datasets"} & metadata.keys()
    assert metadata["license"] == "apache-2.0"  # nobody had changed it there


def test_what_people_wrote_here_goes_along(hub, folder):
    card = folder / "README.md"
    edited = card.read_text().replace("# flowers", "# flowers\n\nOf my garden.")
    card.write_text(edited.replace("license: mit", "license: other\nlicense_name: mine\nlicense_link: LICENSE"))
    check_publishable(folder)
    send(folder)
    text = hub.files(REPO)["README.md"].decode()
    assert "# flowers\n\nOf my garden." in text
    metadata = split_card(text)[0]
    assert (metadata["license"], metadata["license_name"]) == ("other", "mine")


@pytest.mark.parametrize("fault", [{"status": 403}, {"status": 0}, {"cut": True}], ids=str)
@pytest.mark.parametrize("request_", ["HEAD .*README", "GET .*README", "GET .*revision"])
def test_a_card_that_cannot_be_read_is_not_replaced(hub, finished, request_, fault):
    send(finished)
    edited = hub.files(REPO)["README.md"].replace(b"# flowers", b"# Ours")
    HfApi().upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id=REPO)
    hub.fail(request_, times=9, **fault)
    with suppress(RefusedError):
        send(finished)
    assert hub.files(REPO)["README.md"] == edited


def test_nobody_writes_between_reading_and_sending(hub, folder):
    """Somebody saves the card while the weights are on their way."""
    send(folder)
    card = hub.files(REPO)["README.md"]
    write_card(folder, replace(RUN, seed=5))
    slow = hub.fail("POST .*/preupload/", seconds=2.0)
    with ThreadPoolExecutor() as threads:
        sending = threads.submit(upload, folder, DESTINATION, "A version")
        while slow.times:
            time.sleep(0.01)
        hub.repos["model", REPO].append("main", "By hand", {"README.md": File(card + b"Ours.", False)}, False)
        with pytest.raises(RefusedError, match="somebody else changed 'someone/flowers' meanwhile"):
            sending.result()
    send(folder)
    assert b"Ours." in hub.files(REPO)["README.md"]


def test_a_card_that_lost_the_end_of_a_part_is_left_alone(hub, finished):
    send(finished)
    broken = hub.files(REPO)["README.md"].replace(b"<!-- end use -->", b"")
    HfApi().upload_file(path_or_fileobj=broken, path_in_repo="README.md", repo_id=REPO)
    with pytest.raises(RefusedError, match="the card's part 'use' has no '<!-- end use -->'"):
        send(finished)
    assert hub.files(REPO)["README.md"] == broken


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_publishes_tags_and_collects(hub, finished, capsys):
    argv = [str(finished), REPO, "--private", "--tag", "v1", "--collection", "My flowers", "--message", "First"]
    publish(argv)
    repo, out = hub.repos["model", REPO], capsys.readouterr().out
    assert repo.private
    assert repo.tags["v1"] == repo.branches["main"]
    assert repo.branches["main"].title == "First"
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == [REPO]
    line = f'pipeline("image-classification", "{REPO}", revision="v1", trust_remote_code=True)'
    assert line in out
    # By its slug, and a second time.
    publish([str(finished), REPO, "--collection", collection["slug"]])
    assert len(collection["items"]) == 1


def test_branches_and_pull_requests_leave_main_alone(hub, finished, capsys):
    publish([str(finished), "flowers", "--revision", "dev"])
    publish([str(finished), REPO, "--create_pr"])
    repo = hub.repos["model", REPO]
    assert repo.branches["main"].files == {}
    assert repo.branches["dev"].files.keys() == PUBLISHED
    assert repo.pull_requests["refs/pr/1"].files.keys() == PUBLISHED
    assert f"{hub.url}/{REPO}/discussions/1" in capsys.readouterr().out


def test_a_dry_run_asks_nobody(finished, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    publish([str(finished), REPO, "--dry_run"])
    listed = set(re.findall(r"bytes  (\S+)", capsys.readouterr().out))
    assert listed == PUBLISHED


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no/such", REPO], "'no/such' is not there"),
        (["{folder}", "a/b/c"], "'a/b/c' is no name of a repository such as user/name"),
        (["{folder}"], "the following arguments are required: user/name"),
        (["{folder}", REPO, "--priv"], "unrecognized arguments: --priv"),
    ],
)
def test_a_users_mistake_is_one_line(finished, capsys, argv, message):
    with pytest.raises(SystemExit) as exit_info:
        publish([argument.format(folder=finished) for argument in argv])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("publish: error: ")
    assert error.count("\n") == 1
    assert message in error


def spoil_config(folder):
    (folder / "config.json").unlink()


def spoil_code(folder):
    (folder / "configuration_vit_custom.py").unlink()


def spoil_processor(folder):
    (folder / "preprocessor_config.json").unlink()


def spoil_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["head.classifier.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])


def break_code(folder):
    (folder / "modeling_vit_custom.py").write_text("from transformers import nothing_of_this_name\n")


def spoil_card(folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("license: mit", "license: mine"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config, "holds no config.json: give a folder that a training run left"),
        (spoil_code, "lacks configuration_vit_custom.py: give the folder that a finished run left"),
        (spoil_processor, "lacks preprocessor_config.json"),
        (spoil_weights, "head.classifier.bias in .* is not finite: take an earlier checkpoint"),
        (cut_weights, "model.safetensors' cannot be read"),
        (break_code, "does not open in a fresh process: .*nothing_of_this_name"),
        (spoil_card, "license 'mine' is none that the Hub knows"),
    ],
)
def test_what_does_not_work_is_not_published(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        check_publishable(folder)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "there is no token of the Hub: log in by `hf auth login` or set HF_TOKEN"),
        ("hf_unknown", "the Hub does not know your token: log in by `hf auth login` (401"),
        (READ_TOKEN, "may only read: make one that may write"),
        (STRANGERS_TOKEN, f"your token has no right to write to '{REPO}'"),
    ],
)
def test_who_may_not_write_is_told(hub, finished, monkeypatch, token, message):
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(RefusedError, match=re.escape(message)) as error_info:
        send(finished)
    assert token is None or token not in str(error_info.value)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "the Hub refuses it (400: made to fail"),
        (402, "the Hub wants payment for this, or your quota is used up (402"),
        (403, "has no right to write to 'someone/flowers', or your quota is used up (403"),
        (409, "is there already (409"),
        (412, "somebody else changed 'someone/flowers' meanwhile (412"),
        (413, "a file is too large for the Hub (413"),
        (429, "the Hub asks you to wait: too many requests (429"),
        (500, "the Hub failed with status 500"),
        (0, "the connection to the Hub failed"),
    ],
)
def test_each_refusal_has_its_words(hub, finished, status, words):
    create_repo(DESTINATION)
    hub.fail("POST .*/commit/", status=status, times=10)
    with pytest.raises(RefusedError, match=re.escape(words)):
        upload(finished, DESTINATION, "A version")
    hub.faults.clear()
    send(finished)
    assert hub.files(REPO).keys() == PUBLISHED


def test_a_card_that_the_hub_refuses_is_named(hub, folder):
    create_repo(DESTINATION)
    hub.fail("POST .*/validate-yaml", status=400)
    with pytest.raises(RefusedError, match=r"the Hub refuses the card: Invalid metadata in README.md"):
        upload(folder, DESTINATION, "A version")


def test_a_card_that_would_not_be_valid_with_what_is_there_is_not_sent(hub, folder):
    create_repo(DESTINATION)
    content = b"---\nwidget:\n- example_title: no source\n---\n# Mine\n"
    commit = HfApi().upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id=REPO)
    with pytest.raises(RefusedError, match="would not be valid: a widget example has no src"):
        upload(folder, DESTINATION, "A version")
    assert hub.repos["model", REPO].branches["main"].oid == commit.oid


def test_a_public_repository_does_not_become_private_by_being_asked_to(hub, finished):
    send(finished)
    with pytest.raises(RefusedError, match="is there already, and public: nothing was sent"):
        create_repo(replace(DESTINATION, private=True))
    create_repo(Destination("someone/secret", private=True))
    assert hub.repos["model", "someone/secret"].private


def test_a_tag_of_another_version_is_refused_before_anything_is_sent(hub, folder):
    tagged = send(folder)
    add_tag(REPO, "v1", tagged.oid)
    check_tag(DESTINATION, "v1")
    (folder / "all_results.json").write_text('{"a": 1}')
    newer = send(folder)
    with pytest.raises(RefusedError, match="there is a tag 'v1' already, of another version: choose another one"):
        check_tag(DESTINATION, "v1")
    check_tag(DESTINATION, "v2")
    assert hub.repos["model", REPO].branches["main"].oid == newer.oid


def test_figures_of_an_older_model_leave(hub, folder):
    send(folder)
    (folder / "examples" / "1.png").unlink()
    write_card(folder, replace(RUN, confusion_matrix=None, examples={}))
    send(folder)
    assert hub.files(REPO).keys() == PUBLISHED - {"examples/1.png", "confusion_matrix.png"}


def test_a_picture_of_ones_own_goes_along(hub, folder):
    (folder / "pictures").mkdir()
    for name in ("mine.png", "pictures/a[1].png"):
        shutil.copy(folder / "confusion_matrix.png", folder / name)
    shutil.copy(folder / "confusion_matrix.png", folder.parent / "secret.png")
    card = (folder / "README.md").read_text()
    own = "![Mine](./mine.png) ![Too](pictures/a[1].png) ![Far](https://x.org/a.png)"
    (folder / "README.md").write_text(f"{card}\n{own}\n")
    assert set(collect_files(folder)) == PUBLISHED | {"mine.png", "pictures/a[1].png"}
    check_publishable(folder)
    for stranger in ("../secret.png", str(folder.parent / "secret.png"), "*"):
        (folder / "README.md").write_text(f"{card}\n![Not mine]({stranger})\n")
        assert set(collect_files(folder)) == PUBLISHED
        with pytest.raises(ValueError, match=re.escape(f"{stranger} is not ")):
            check_publishable(folder)


def test_pictures_that_people_put_on_the_hub_stay(hub, folder):
    send(folder)
    HfApi().upload_file(path_or_fileobj=b"png", path_in_repo="examples/theirs.png", repo_id=REPO)
    send(folder)
    assert hub.files(REPO).keys() == PUBLISHED | {"examples/theirs.png"}


def test_words_go_along_until_there_are_some_on_the_hub(hub, folder, capsys):
    send(folder)
    for words in ("Written here.", "Written here later."):
        (folder / "README.md").write_text(str(render_card(RUN, PUBLISHED)) + f"\n{words}\n")
        send(folder)
        assert "Written here." in hub.files(REPO)["README.md"].decode()
        assert ("keeps the words" in capsys.readouterr().out) == (words == "Written here later.")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "run.json").write_text("{"), "run.json' holds no facts"),
        (lambda folder: (folder / "run.json").write_text('{"name": "x", "stages": [1]}'), "run.json' holds no facts"),
        (lambda folder: (folder / "recipe.yaml").write_text("- a"), "recipe.yaml' holds no mapping"),
        (lambda folder: (folder / "recipe.yaml").write_text("{a: ["), "recipe.yaml' is not YAML"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json' holds no mapping"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json' is not JSON"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (lambda folder: (folder / "examples" / "1.png").unlink(), "examples/1.png is not there"),
        (lambda folder: (folder / "README.md").unlink(), r"lacks README.md: make the card by `python -m model_cards"),
    ],
)
def test_what_cannot_be_published_is_said_before_anybody_is_asked(hub, folder, capsys, spoil, message):
    spoil(folder)
    with pytest.raises(SystemExit) as exit_info:
        publish([str(folder), REPO])
    assert exit_info.value.code == 2
    assert re.fullmatch(f"publish: error: .*{message}.*\n", capsys.readouterr().err)
    assert not hub.requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tag", "bad tag~^"], "--tag 'bad tag~\\^' is no name that git allows"),
        (["--revision", "my branch"], "--revision 'my branch' is no name that git allows"),
        (["--revision", ""], "--revision '' is no name"),
        (["--revision", "refs/pr/1"], "--revision 'refs/pr/1' is no name"),
        (["--message", ""], "--message is empty"),
        (["--create_pr", "--tag", "v1"], "--tag v1 names what is there: not with --create_pr"),
    ],
)
def test_options_that_make_no_sense_are_one_line(hub, finished, capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        publish([str(finished), REPO, *options])
    assert exit_info.value.code == 2
    assert re.fullmatch(f"publish: error: {message}.*\n", capsys.readouterr().err)
    assert not hub.requests


def test_an_interruption_says_how_to_go_on(hub, finished, monkeypatch, capsys):
    monkeypatch.setattr("trainers.hub.check_opens", interrupt)
    with pytest.raises(SystemExit) as exit_info:
        publish([str(finished), REPO])
    assert exit_info.value.code == 130
    assert "interrupted; nothing is lost: go on by `python -m trainers.publish" in capsys.readouterr().err


def interrupt(folder):
    raise KeyboardInterrupt


def test_code_that_needs_our_packages_is_not_published(folder):
    code = folder / "modeling_vit_custom.py"
    code.write_text(f"import trainers.hub\n{code.read_text()}")
    with pytest.raises(ValueError, match=r"does not open in a fresh process: .*trainers"):
        check_publishable(folder)


@pytest.mark.slow
def test_a_proposal_of_nothing_new_says_so(hub, folder, capsys):
    publish([str(folder), REPO])
    publish([str(folder), REPO, "--create_pr"])
    assert f"Nothing differs from {REPO}: there is nothing to propose" in capsys.readouterr().out
    assert not hub.repos["model", REPO].pull_requests


@pytest.mark.slow
def test_a_tag_that_is_taken_is_named(hub, folder, capsys):
    publish([str(folder), REPO, "--tag", "v1"])
    publish([str(folder), REPO, "--tag", "v1", "--collection", "Flowers"])  # of the same version: goes on
    (folder / "all_results.json").write_text("[]")
    message = r"error: the new version is there, but tag 'v1' is of the one before: choose another one; .* go on by"
    with pytest.raises(SystemExit, match=message):
        publish([str(folder), REPO, "--tag", "v1"])


@pytest.mark.slow
def test_a_tag_or_a_collection_that_failed_is_made_up_for(hub, finished, capsys):
    argv = [str(finished), REPO, "--tag", "v1", "--collection", "Flowers", "--revision", "dev"]
    for request in ("POST .*/branch/", "POST .*/tag/", "GET .*/refs", "POST .*/collections"):
        hub.fail(request, status=403)
        with pytest.raises(SystemExit, match=r"error: your token has no right .* nothing is lost: settle that"):
            publish(argv)
    publish(argv)
    repo = hub.repos["model", REPO]
    assert repo.tags["v1"] == repo.branches["dev"]
    (collection,) = hub.collections.values()
    assert len(collection["items"]) == 1


def requests_of_a_push(hub, finished):
    send(finished)
    return len(hub.requests)


FAULTS = [{"status": 403}, {"status": 0, "after": True}]
# The client waits before it tries again.
SLOW_FAULTS = [{"status": status} for status in (0, 401, 404, 413, 429, 500)]


@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(fault, marks=pytest.mark.slow) for fault in SLOW_FAULTS)], ids=str
)
def test_a_push_goes_on_wherever_it_broke(hub, finished, fault):
    count = requests_of_a_push(hub, finished)
    for number in range(count):
        repo_id = f"someone/number-{number}"
        destination = Destination(repo_id)
        hub.stored.clear()
        hub.fail("", skip=number, **fault)
        try:
            send(finished, destination)
            # The client tries again by itself where that is safe.
            assert fault["status"] in (0, 429, 500), hub.requests[-1]
        except RefusedError as error:
            assert "\n" not in str(error)
        hub.faults.clear()
        send(finished, destination)
        files = hub.files(repo_id)
        assert files.keys() == PUBLISHED
        assert {name: files[name] for name in contents(finished)} == contents(finished)
        # An answer that was lost makes no second version.
        assert len(HfApi().list_repo_commits(repo_id)) == 2


def test_a_slow_hub_is_waited_for(hub, finished):
    hub.fail("PUT", seconds=1.0)
    send(finished)
    assert hub.files(REPO).keys() == PUBLISHED


def test_a_config_that_names_no_code_sends_none(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    assert not [name for name in collect_files(folder) if name.endswith(".py")]
