"""The four languages: agreement, joining, and telling one language from another."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loraflow.demo.language import (
    COLOURS,
    LANGUAGES,
    NOUNS,
    PEOPLE,
    SENTENCES,
    colour_fields,
    in_language,
    noun_fields,
    person_fields,
    say,
    steps_phrase,
)

BOOK = next(noun for noun in NOUNS if noun.en[0] == "book")
APPLE = next(noun for noun in NOUNS if noun.en[0] == "apple")
CARD = next(noun for noun in NOUNS if noun.en[0] == "card")


@pytest.mark.parametrize(
    ("count", "form"),
    [(1, "книгу"), (2, "книги"), (4, "книги"), (5, "книг"), (11, "книг"), (14, "книг"), (21, "книгу"), (32, "книги")],
)
def test_russian_nouns_agree_with_their_number(count: int, form: str) -> None:
    assert noun_fields("ru", BOOK, count)["noun"] == form


def test_russian_possession_takes_the_nominative() -> None:
    sentence = say("ru", "has", n=21, **person_fields("ru", PEOPLE[5]), **noun_fields("ru", BOOK, 21))
    assert sentence == "У Анны 21 книга."


def test_spanish_questions_agree_in_gender() -> None:
    assert say("es", "how_many", **noun_fields("es", APPLE)) == "¿Cuántas manzanas tiene ahora?"
    assert say("es", "how_many", **noun_fields("es", BOOK)) == "¿Cuántos libros tiene ahora?"


def test_colours_agree_with_their_noun() -> None:
    red = COLOURS[0]
    assert colour_fields("es", red, CARD)["colour"] == "roja"
    assert colour_fields("ru", red, CARD) == {"colour": "красная", "colour_acc": "красную"}
    assert colour_fields("ru", red, APPLE) == {"colour": "красное", "colour_acc": "красное"}


def test_chinese_counts_with_measure_words() -> None:
    fields = person_fields("zh", PEOPLE[0]) | noun_fields("zh", BOOK, 12)
    assert say("zh", "has", n=12, **fields) == "汤姆有 12 本书。"


def test_pronouns_agree_with_the_person() -> None:
    assert person_fields("en", PEOPLE[5], PEOPLE[0]) == {
        "who": "Anna",
        "He": "She",
        "he": "she",
        "him": "her",
        "friend": "Tom",
    }
    assert person_fields("ru", PEOPLE[0], PEOPLE[2])["with_friend"] == "со Львом"


@pytest.mark.parametrize(
    ("language", "phrase"),
    [
        ("en", "takes a number, adds 3 and squares it"),
        ("es", "toma un número, suma 3 y eleva al cuadrado"),
        ("ru", "берёт число, прибавляет 3 и возводит в квадрат"),
        ("zh", "输入一个数，先加上 3，再求平方"),
    ],
)
def test_steps_are_listed_as_the_language_lists_them(language: str, phrase: str) -> None:
    phrases = [say(language, "add", n=3), say(language, "square")]
    assert steps_phrase(language, say(language, "number"), phrases) == phrase


def test_every_language_says_the_same_sentences() -> None:
    assert all(SENTENCES[language].keys() == SENTENCES["en"].keys() for language in LANGUAGES)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The answer is 17.", "en"),
        ("La respuesta es 17.", "es"),
        ("Ответ: 17.", "ru"),
        ("答案是 17。", "zh"),
    ],
)
def test_a_sentence_is_in_its_own_language_only(text: str, language: str) -> None:
    assert [other for other in LANGUAGES if in_language(text, other)] == [language]


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_and_code_alone_are_in_no_language(language: str) -> None:
    assert not in_language("12 + 5 = 17", language)
    assert not in_language("```python\ndef f(x):\n    return x", language)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Tomás tiene 12. He buys 5.", "es"),
        ("У Тома 12. He buys 5.", "ru"),
        ("汤姆有 12 个。So 12 + 5 = 17.", "zh"),
        ("汤姆有 12 个。Ответ: 12.", "zh"),
    ],
)
def test_one_foreign_word_is_enough_to_fail(text: str, language: str) -> None:
    assert not in_language(text, language)


def test_code_in_an_answer_is_not_english() -> None:
    assert in_language("Эта функция прибавляет 3.\n```python\ndef f(x):\n    return x + 3\n```", "ru")


def test_the_words_are_light_to_import() -> None:
    code = "import sys, loraflow.demo.tasks, loraflow.demo.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
