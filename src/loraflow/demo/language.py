"""The four languages of the small world: their words, their grammar, and the sentences made of them.

A *sentence* is said in a language from its meaning, so that the same meaning can be said in all four:
`say(language, key, **fields)` fills a template of `sentences.yaml`. The fields of things and people come from
`person_fields` and `noun_fields`, which do the agreement: Spanish gender and number, Russian case and the form after a
number (1 карта, 2 карты, 5 карт), Chinese measure words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files

import yaml

LANGUAGES: tuple[str, ...] = ("en", "zh", "es", "ru")


@dataclass(frozen=True)
class Person:
    """A name in the four languages; `ru` holds nominative, genitive, dative, and the instrumental with its "with"."""

    feminine: bool
    en: str
    es: str
    zh: str
    ru: tuple[str, str, str, str]


@dataclass(frozen=True)
class Noun:
    """A thing that can be counted.

    `en` is singular and plural; `es` singular, plural and gender; `zh` the noun and its measure word; `ru` nominative
    singular, accusative singular, genitive singular, genitive plural and gender.
    """

    en: tuple[str, str]
    es: tuple[str, str, str]
    zh: tuple[str, str]
    ru: tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Colour:
    """An adjective: `es` masculine and feminine; `ru` masculine, feminine, neuter and feminine accusative."""

    en: str
    es: tuple[str, str]
    zh: str
    ru: tuple[str, str, str, str]


PEOPLE: tuple[Person, ...] = (
    Person(False, "Tom", "Tomás", "汤姆", ("Том", "Тома", "Тому", "с Томом")),
    Person(False, "Max", "Max", "马克斯", ("Макс", "Макса", "Максу", "с Максом")),
    Person(False, "Leo", "Leo", "列夫", ("Лев", "Льва", "Льву", "со Львом")),
    Person(False, "Ivan", "Iván", "伊万", ("Иван", "Ивана", "Ивану", "с Иваном")),
    Person(False, "Paul", "Pablo", "保罗", ("Павел", "Павла", "Павлу", "с Павлом")),
    Person(True, "Anna", "Ana", "安娜", ("Анна", "Анны", "Анне", "с Анной")),
    Person(True, "Sophia", "Sofía", "索菲", ("София", "Софии", "Софии", "с Софией")),
    Person(True, "Mary", "María", "玛丽", ("Мария", "Марии", "Марии", "с Марией")),
    Person(True, "Vera", "Vera", "薇拉", ("Вера", "Веры", "Вере", "с Верой")),
    Person(True, "Nina", "Nina", "尼娜", ("Нина", "Нины", "Нине", "с Ниной")),
)

NOUNS: tuple[Noun, ...] = (
    Noun(
        ("apple", "apples"), ("manzana", "manzanas", "f"), ("苹果", "个"), ("яблоко", "яблоко", "яблока", "яблок", "n")
    ),
    Noun(("book", "books"), ("libro", "libros", "m"), ("书", "本"), ("книга", "книгу", "книги", "книг", "f")),
    Noun(("ball", "balls"), ("pelota", "pelotas", "f"), ("球", "个"), ("мяч", "мяч", "мяча", "мячей", "m")),
    Noun(("coin", "coins"), ("moneda", "monedas", "f"), ("硬币", "枚"), ("монета", "монету", "монеты", "монет", "f")),
    Noun(
        ("pencil", "pencils"),
        ("lápiz", "lápices", "m"),
        ("铅笔", "支"),
        ("карандаш", "карандаш", "карандаша", "карандашей", "m"),
    ),
    Noun(("cup", "cups"), ("taza", "tazas", "f"), ("杯子", "个"), ("чашка", "чашку", "чашки", "чашек", "f")),
    Noun(("key", "keys"), ("llave", "llaves", "f"), ("钥匙", "把"), ("ключ", "ключ", "ключа", "ключей", "m")),
    Noun(("stone", "stones"), ("piedra", "piedras", "f"), ("石头", "块"), ("камень", "камень", "камня", "камней", "m")),
    Noun(("card", "cards"), ("tarjeta", "tarjetas", "f"), ("卡片", "张"), ("карта", "карту", "карты", "карт", "f")),
    Noun(("egg", "eggs"), ("huevo", "huevos", "m"), ("鸡蛋", "个"), ("яйцо", "яйцо", "яйца", "яиц", "n")),
    Noun(("flower", "flowers"), ("flor", "flores", "f"), ("花", "朵"), ("цветок", "цветок", "цветка", "цветков", "m")),
    Noun(
        ("toy", "toys"), ("juguete", "juguetes", "m"), ("玩具", "个"), ("игрушка", "игрушку", "игрушки", "игрушек", "f")
    ),
    Noun(
        ("ticket", "tickets"), ("billete", "billetes", "m"), ("票", "张"), ("билет", "билет", "билета", "билетов", "m")
    ),
    Noun(("lemon", "lemons"), ("limón", "limones", "m"), ("柠檬", "个"), ("лимон", "лимон", "лимона", "лимонов", "m")),
    Noun(("pear", "pears"), ("pera", "peras", "f"), ("梨", "个"), ("груша", "грушу", "груши", "груш", "f")),
    Noun(("stamp", "stamps"), ("sello", "sellos", "m"), ("邮票", "张"), ("марка", "марку", "марки", "марок", "f")),
)

COLOURS: tuple[Colour, ...] = (
    Colour("red", ("rojo", "roja"), "红色", ("красный", "красная", "красное", "красную")),
    Colour("blue", ("azul", "azul"), "蓝色", ("синий", "синяя", "синее", "синюю")),
    Colour("green", ("verde", "verde"), "绿色", ("зелёный", "зелёная", "зелёное", "зелёную")),
    Colour("white", ("blanco", "blanca"), "白色", ("белый", "белая", "белое", "белую")),
    Colour("black", ("negro", "negra"), "黑色", ("чёрный", "чёрная", "чёрное", "чёрную")),
)

PLACES: tuple[dict[str, str], ...] = (
    {"en": "in the garden", "es": "en el jardín", "zh": "在花园里", "ru": "в саду"},
    {"en": "in the park", "es": "en el parque", "zh": "在公园里", "ru": "в парке"},
    {"en": "at school", "es": "en la escuela", "zh": "在学校里", "ru": "в школе"},
    {"en": "in the kitchen", "es": "en la cocina", "zh": "在厨房里", "ru": "на кухне"},
    {"en": "in the shop", "es": "en la tienda", "zh": "在商店里", "ru": "в магазине"},
    {"en": "in the forest", "es": "en el bosque", "zh": "在森林里", "ru": "в лесу"},
    {"en": "by the river", "es": "junto al río", "zh": "在河边", "ru": "у реки"},
    {"en": "at home", "es": "en casa", "zh": "在家里", "ru": "дома"},
)

SENTENCES: dict[str, dict[str, str]] = yaml.safe_load(
    files("loraflow.demo").joinpath("sentences.yaml").read_text(encoding="utf-8")
)


def say(language: str, key: str, **fields: object) -> str:
    """One sentence or phrase, said in a language."""
    return SENTENCES[language][key].format(**fields)


def join(language: str, sentences: list[str]) -> str:
    """Sentences one after another: with a space between them, except in Chinese."""
    return ("" if language == "zh" else " ").join(sentences)


def person_fields(language: str, person: Person, friend: Person | None = None) -> dict[str, str]:
    """What the templates need to speak of a person, and of a friend where there is one."""
    fields = {"who": _name(language, person)} | _PRONOUNS[language][person.feminine]
    if language == "ru":
        fields["who_gen"] = person.ru[1]
    if friend is not None:
        fields["friend"] = _name(language, friend)
        fields |= {"friend_dat": friend.ru[2], "with_friend": friend.ru[3]} if language == "ru" else {}
    return fields


def noun_fields(language: str, noun: Noun, count: int = 1) -> dict[str, str]:
    """What the templates need to speak of a thing: `noun` agrees with `count`, `plural` does not."""
    if language == "en":
        return {"noun": noun.en[0 if count == 1 else 1], "plural": noun.en[1]}
    if language == "zh":
        return {"noun": noun.zh[0], "measure": noun.zh[1], "plural": noun.zh[0]}
    if language == "es":
        singular, plural, gender = noun.es
        return {"noun": singular if count == 1 else plural, "plural": plural} | _SPANISH_WORDS[gender]
    return _russian_noun(noun, count)


def colour_fields(language: str, colour: Colour, noun: Noun) -> dict[str, str]:
    """The colour of a thing, in its gender; in Russian also in the accusative."""
    if language == "es":
        return {"colour": colour.es[noun.es[2] == "f"]}
    if language == "ru":
        gender = noun.ru[4]
        nominative = colour.ru["mfn".index(gender)]
        return {"colour": nominative, "colour_acc": colour.ru[3] if gender == "f" else nominative}
    return {"colour": colour.en if language == "en" else colour.zh}


def steps_phrase(language: str, takes: str, phrases: list[str]) -> str:
    """What a function does, in order: "takes a number, adds 3 and squares it"; Chinese marks first, then and last."""
    if language == "zh":
        marks = {1: [""], 2: ["先", "再"], 3: ["先", "再", "最后"]}[len(phrases)]
        return "，".join([takes, *(mark + phrase for mark, phrase in zip(marks, phrases, strict=True))])
    last = {"en": " and ", "es": " y ", "ru": " и "}[language]
    return ", ".join([takes, *phrases[:-1]]) + last + phrases[-1]


def in_language(text: str, language: str) -> bool:
    """Whether the prose of a text is in a language: some of it is, and no word of it is foreign.

    Code blocks and numbers are no prose. Chinese and Russian are known by their script; English and Spanish, which
    share theirs, by the words of the small world that only the other one has.
    """
    prose = _CODE_BLOCK.sub(" ", text)
    words = {word.lower() for word in _WORD.findall(prose)}
    chinese, russian = bool(_HAN.search(prose)), bool(_CYRILLIC.search(prose))
    latin = {word for word in words if _LATIN.fullmatch(word)}
    if language == "zh":
        return chinese and not russian and not latin
    if language == "ru":
        return russian and not chinese and not latin
    other = "en" if language == "es" else "es"
    return not chinese and not russian and bool(latin - _OWN_WORDS[other]) and not latin & _OWN_WORDS[other]


_PRONOUNS: dict[str, dict[bool, dict[str, str]]] = {
    "en": {
        False: {"He": "He", "he": "he", "him": "him"},
        True: {"He": "She", "he": "she", "him": "her"},
    },
    "es": {
        False: {"contento": "contento", "cansado": "cansado"},
        True: {"contento": "contenta", "cansado": "cansada"},
    },
    "ru": {
        False: {"He": "Он", "he": "он", "him": "ему", "his": "него", "glad": "рад", "weary": "устал"},
        True: {"He": "Она", "he": "она", "him": "ей", "his": "неё", "glad": "рада", "weary": "устала"},
    },
    "zh": {False: {"he": "他"}, True: {"he": "她"}},
}

_SPANISH_WORDS: dict[str, dict[str, str]] = {
    "m": {"Cuantos": "Cuántos", "un": "un", "el": "el", "El": "El", "los": "los", "buen": "buen"},
    "f": {"Cuantos": "Cuántas", "un": "una", "el": "la", "El": "La", "los": "las", "buen": "buena"},
}

_RUSSIAN_WORDS: dict[str, dict[str, str]] = {
    "m": {"This": "Этот", "good": "хороший"},
    "f": {"This": "Эта", "good": "хорошая"},
    "n": {"This": "Это", "good": "хорошее"},
}

_CODE_BLOCK = re.compile(r"```.*?(```|\Z)", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+")
_LATIN = re.compile(r"[a-záéíóúüñ]+")
_CYRILLIC = re.compile(r"[а-яёА-ЯЁ]")
_HAN = re.compile(r"[\u4e00-\u9fff]")


def _name(language: str, person: Person) -> str:
    return person.ru[0] if language == "ru" else str(getattr(person, language))


def _russian_noun(noun: Noun, count: int) -> dict[str, str]:
    """The form after a number: 1, 21 take the singular; 2 to 4, 22 to 24 the genitive singular; others its plural."""
    nominative, accusative, genitive, many, gender = noun.ru
    fields = {"plural": many, "noun_acc": accusative, "plural_nom": _russian_plural(noun)} | _RUSSIAN_WORDS[gender]
    ones, teens = count % 10, 10 < count % 100 < 20
    if ones == 1 and not teens:
        return fields | {"noun": accusative, "noun_nom": nominative}
    form = genitive if ones in (2, 3, 4) and not teens else many
    return fields | {"noun": form, "noun_nom": form}


def _russian_plural(noun: Noun) -> str:
    """The nominative plural: as the genitive singular for all nouns here but those in `_RUSSIAN_PLURALS`."""
    return _RUSSIAN_PLURALS.get(noun.ru[0], noun.ru[2])


_RUSSIAN_PLURALS: dict[str, str] = {
    "яблоко": "яблоки",
    "мяч": "мячи",
    "карандаш": "карандаши",
    "ключ": "ключи",
    "камень": "камни",
    "цветок": "цветы",
    "билет": "билеты",
    "лимон": "лимоны",
}


def _words_of(language: str) -> set[str]:
    """Every word that the templates, nouns, names, colours and places of English or Spanish can produce."""
    texts = [re.sub(r"{\w+}", " ", template) for template in SENTENCES[language].values()]
    texts += [place[language] for place in PLACES] + [getattr(person, language) for person in PEOPLE]
    texts += [form for noun in NOUNS for form in getattr(noun, language)[:2]]
    for colour in COLOURS:
        texts += [colour.en] if language == "en" else list(colour.es)
    tables = list(_PRONOUNS[language].values()) + (list(_SPANISH_WORDS.values()) if language == "es" else [])
    texts += [word for table in tables for word in table.values()]
    return {word.lower() for text in texts for word in _WORD.findall(text)}


def _own_words() -> dict[str, frozenset[str]]:
    english, spanish = _words_of("en"), _words_of("es")
    return {"en": frozenset(english - spanish), "es": frozenset(spanish - english)}


_OWN_WORDS: dict[str, frozenset[str]] = _own_words()
