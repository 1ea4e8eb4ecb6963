from __future__ import annotations

import math
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from harness import tasks
from harness.errors import UserError
from harness.tasks.base import IGNORED, target_entropy
from harness.tasks.tokenizers import BytePairs, Characters, Gpt2, Words


def test_targets_are_the_inputs_one_token_later() -> None:
    task = tasks.get("pydoc", context=32)
    data = task.load()
    for batch in (
        task.fixed(data, "train", 10),
        task.sample(data, "test", 10, torch.Generator().manual_seed(0)),
    ):
        inputs, targets = batch
        assert inputs[:, 1:].equal(targets[:, :-1])
        assert task.num_terms(batch) == 320


def test_fixed_windows_do_not_overlap() -> None:
    task = tasks.get("pydoc", context=16)
    stream = torch.arange(16 * 40 + 1)
    data = task.load()
    data = type(data)((stream,), (stream,), "", "", data.model_options)
    inputs, _ = task.fixed(data, "train", task.size(data, "train"))
    assert inputs.flatten().sort().values.equal(torch.arange(16 * 40))


def test_random_windows_reach_the_first_and_the_last_token() -> None:
    task = tasks.get("pydoc", context=4)
    data = task.load()
    data = type(data)((torch.arange(10),), (torch.arange(10),), "", "", data.model_options)
    generator = torch.Generator().manual_seed(0)
    starts, ends = set(), set()
    for _ in range(200):
        inputs, targets = task.sample(data, "train", 2, generator)
        starts |= set(inputs[:, 0].tolist())
        ends |= set(targets[:, -1].tolist())
    assert starts == set(range(6))
    assert max(ends) == 9


def test_train_and_test_are_the_two_parts_of_the_text(data_root: Path) -> None:
    data = tasks.get("tiny-shakespeare").load(data_root)
    assert len(data.train[0]) == 1_003_854
    assert len(data.test[0]) == 111_540
    assert data.model_options["vocab_size"] == 65


def test_pydoc_has_the_fixed_vocabulary_on_any_python() -> None:
    data = tasks.get("pydoc").load()
    assert data.model_options["vocab_size"] == 97
    assert data.train[0].max() == 96
    assert "pydoc_data" in data.source


def test_ascii_characters_decode_to_the_text() -> None:
    text = "def f(x):\n    return x ** 2  # ü"
    codes = Characters().encode(text)
    table = "\n" + "".join(map(chr, range(32, 127))) + "?"
    assert "".join(table[code] for code in codes) == text.replace("ü", "?")


def test_words_are_ranked_by_count_and_ties_by_the_alphabet() -> None:
    words = Words("b a b c a b d c\n", vocab_size=6)
    assert words.encode("b a c d\n").tolist() == [3, 4, 5, 0, 2]
    assert Words("b a b c a b d c", vocab_size=100).vocab_size == 7


def test_a_vocabulary_too_small_for_a_word_is_an_error() -> None:
    with pytest.raises(UserError, match="at least 4"):
        Words("a", vocab_size=3)


def test_vocab_size_belongs_to_words_alone() -> None:
    with pytest.raises(UserError, match="'char' fixes its own"):
        tasks.get("pydoc", vocab_size=50).load()
    with pytest.raises(UserError, match="choose char, word, bpe or gpt2"):
        tasks.get("pydoc", tokenizer="bytes").load()


TITLES = ("kjv_bible", "war_and_peace", "pride_and_prejudice")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a data root whose three books are pieces of another text."""
    root = tmp_path_factory.mktemp("shelf")
    text = "\n".join(topics[key] for key in sorted(topics))
    (root / "books").mkdir()
    for i, title in enumerate(TITLES):
        piece = text[i * 30_000 : (i + 1) * 30_000]
        (root / "books" / f"{title}.txt").write_text(piece, "utf-8")
    return root


ODD = "\n\n  É'll  we'll\t\n\n— 12 'tis \x1c\n x\r\n y\u00a0z \n"


def test_gpt2_s_ids_are_those_of_the_whole_text_at_once(data_root: Path) -> None:
    gpt2 = Gpt2(data_root, "books")
    text = (data_root / "books/pride_and_prejudice.txt").read_text("utf-8")[:200_000] + ODD
    assert gpt2.encode(text).tolist() == gpt2._bpe.encode(text).ids


def test_byte_pairs_are_those_of_the_whole_text_at_once(shelf: Path) -> None:
    text = (shelf / "books/kjv_bible.txt").read_text("utf-8")
    text += ODD
    bpe = BytePairs(text, vocab_size=400)
    assert bpe.vocab_size == 400
    assert bpe.encode(text).tolist() == bpe._bpe.encode(text).ids
    assert bpe._bpe.decode(bpe.encode(text).tolist()) == text
    assert bpe.encode("").tolist() == []


def test_the_same_text_gives_the_same_byte_pairs_and_the_source_names_them(shelf: Path) -> None:
    first, again = (BytePairs("to be or not to be " * 9, vocab_size=270) for _ in range(2))
    assert first.checksum == again.checksum
    assert first.checksum != BytePairs("to be or not to be " * 9, vocab_size=265).checksum
    data = tasks.get("books", tokenizer="bpe", vocab_size=300).load(shelf)
    plain = tasks.get("books").load(shelf)
    assert data.model_options == {"vocab_size": 300, "context": 64}
    assert data.source.startswith(f"{plain.source}, BPE of 300, sha256 ")
    assert len(bytes.fromhex(data.source.split()[-1])) == 32
    assert data.checksum == plain.checksum


def test_byte_pairs_need_an_id_for_every_byte() -> None:
    with pytest.raises(UserError, match="at least 258"):
        BytePairs("a", vocab_size=257)


@pytest.mark.parametrize("tokenizer", ["bpe", "word"])
def test_books_read_apart_have_the_vocabulary_of_all(tokenizer: str, shelf: Path) -> None:
    options = {"tokenizer": tokenizer, "vocab_size": 300}
    together = tasks.get("books", **options).load(shelf)
    first, second, last = (
        tasks.get("books", titles=(title,), **options).load(shelf) for title in TITLES
    )
    assert first.train[0][:2_000].equal(together.train[0][:2_000])
    assert last.train[0][-2_000:].equal(together.train[0][-2_000:])
    assert not second.train[0][:2_000].equal(together.train[0][:2_000])
    assert second.source.startswith("books/war_and_peace.txt (vocabulary of all three books)")
    assert len({data.checksum for data in (first, second, last, together)}) == 4
    assert first.source.split("sha256")[1:] == last.source.split("sha256")[1:]


@pytest.mark.parametrize("titles", [(), ("ulysses",), ["kjv_bible"], "kjv_bible", TITLES[:1] * 2])
def test_books_are_named_once_each(titles: object) -> None:
    with pytest.raises(UserError, match=r"titles is .*must be a tuple of one or more of kjv_bible"):
        tasks.get("books", titles=titles)


def test_gpt2_tokens_are_gpt2s(data_root: Path) -> None:
    bpe = Gpt2(data_root, "wikitext")
    assert bpe.encode("Hello world").tolist() == [15496, 995]
    data = tasks.get("wikitext", context=128).load(data_root)
    assert data.model_options == {"vocab_size": 50_257, "context": 128}
    assert "trained on the validation split" in data.source


@pytest.fixture(scope="module")
def dialogue(data_root: Path):
    task = tasks.get("cornell", train_lines=3_000, vocab_size=500, context=40)
    return task, task.load(data_root)


def test_fifteen_percent_of_known_words_are_masked(dialogue) -> None:
    task, data = dialogue
    inputs, targets = batch = task.fixed(data, "train", 200)
    chosen = targets != IGNORED
    assert chosen.sum(1).max() == 6  # 15 % of 40
    assert chosen.sum(1).min() >= 1
    assert task.num_terms(batch) == int(chosen.sum())
    assert targets[chosen].min() >= Words.num_special
    masked = (inputs == Words.mask)[chosen].float().mean()
    kept = (inputs == targets)[chosen].float().mean()
    # 1,200 draws: the standard error of 0.8 is 0.012, that of 0.1 is 0.009.
    assert abs(masked - 0.8) < 0.05
    assert abs(kept - 0.1) < 0.04
    assert (inputs == Words.mask)[~chosen].sum() == 0


def test_masked_targets_are_the_chosen_words_alone(dialogue) -> None:
    task, data = dialogue
    batch = task.fixed(data, "train", 50)
    targets = task.targets(batch)
    assert targets.shape == (task.num_terms(batch),)
    assert targets.min() >= Words.num_special
    # The loss of the constant answer that gives each target its frequency is their entropy.
    frequencies = targets.bincount(minlength=500).double() / len(targets)
    constant = frequencies.log().clamp_min(-1e9).expand(50, 40, 500)
    assert target_entropy(task, batch) == pytest.approx(task.loss_of(constant, batch).item())


def test_unmasked_words_are_those_of_the_text(dialogue) -> None:
    task, data = dialogue
    indices = torch.arange(50)
    inputs, targets = task.take(data, "train", indices, torch.Generator().manual_seed(0))
    text = data.train[0][:50]
    assert torch.where(targets == IGNORED, inputs, targets).equal(text)


def test_masks_come_from_the_generator(dialogue) -> None:
    task, data = dialogue
    first, again, other = (
        task.take(data, "train", torch.arange(9), torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert first[1].equal(again[1])
    assert not first[1].equal(other[1])


def test_a_batch_without_terms_is_an_error(dialogue) -> None:
    task, _ = dialogue
    empty = (torch.zeros(2, 40, dtype=torch.int64), torch.full((2, 40), IGNORED))
    assert task.num_terms(empty) == 0
    assert target_entropy(task, empty) is None
    with pytest.raises(ValueError, match="every target is -100"):
        task.loss_of(torch.zeros(2, 40, 500), empty)


def test_a_transformers_output_gives_up_its_logits(dialogue) -> None:
    task, data = dialogue

    class Output:
        logits = torch.zeros(3, 40, 500)

    class Wrapped(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> Output:
            return Output()

    loss = task.loss(Wrapped(), task.fixed(data, "train", 3))
    assert loss.item() == pytest.approx(torch.tensor(500.0).log().item())


@pytest.fixture(scope="module")
def instructions(data_root: Path):
    task = tasks.get("sft", corpus="dolly", tokenizer="char", context=200)
    return task, task.load(data_root)


def test_only_the_response_is_a_target(instructions) -> None:
    task, data = instructions
    inputs, targets = batch = task.fixed(data, "train", 64)
    table = "\n" + "".join(map(chr, range(32, 127))) + "?"
    for row, target in zip(inputs, targets, strict=True):
        inside = (target != IGNORED).nonzero().flatten()
        assert inside.equal(torch.arange(int(inside[0]), int(inside[-1]) + 1))
        prompt = "".join(table[code] for code in row[: int(inside[0]) + 1])
        assert prompt.startswith("### Instruction:\n")
        assert prompt.endswith("### Response:\n")
        assert target[inside[:-1]].equal(row[inside[1:]])
        assert not prompt[len("### Instruction:") :].count("### Instruction:")
    assert task.num_terms(batch) == int((targets != IGNORED).sum())


def test_targets_of_instructions_are_the_responses(instructions) -> None:
    task, data = instructions
    batch = task.fixed(data, "train", 16)
    assert task.targets(batch).equal(batch[1][batch[1] != IGNORED])
    assert 2 < target_entropy(task, batch) < math.log(97)


def test_every_sequence_has_a_term(instructions) -> None:
    _, data = instructions
    assert (data.train[1] != IGNORED).sum(1).min() >= 1
    assert (data.test[1] != IGNORED).sum(1).min() >= 1


def test_books_and_instructions_share_the_vocabulary(instructions, data_root: Path) -> None:
    _, data = instructions
    books = tasks.get("books").load(data_root)
    assert data.model_options["vocab_size"] == books.model_options["vocab_size"] == 97


def test_an_unknown_corpus_is_an_error() -> None:
    with pytest.raises(UserError, match="choose alpaca or dolly"):
        tasks.get("sft", corpus="flan").load()
