"""Which answers count as right: by our rule, the last number, and by the rule of the paper's official code.

Answers as models write them, judged by hand first. `why` says where the two rules differ from each other, or from what
a reader would say.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from loraflow.evaluation.paper.answers import official_answer, official_gold
from loraflow.evaluation.scoring import same_number


class Case(NamedTuple):
    text: str
    gold: str
    ours: bool
    official: bool
    why: str = ""


CASES = [
    # English, as the math adapter's own training data ends
    Case("She makes 9 * 2 = $18 every day at the farmer's market.\n#### 18\nThe answer is: 18", "18", True, True),
    Case("The answer is: 18.", "18", True, True),
    Case("The answer is: 70,000", "70000", True, True),
    Case("#### 70,000", "70000", True, True),
    Case("#### 540\nThe answer is: 540", "540", True, True),
    Case("16 - 3 - 4 = <<16-3-4=9>>9\nShe has 9 * 2 = <<9*2=18>>18", "18", True, True),
    Case(
        "The answer is: $18", "18", True, False, "the `$` hides it from the statement, and `$18` is no word of digits"
    ),
    Case("So he made a profit of 70000", "70000", True, True),
    Case("So he made a profit of $70,000.", "70000", True, False, "no word is all digits"),
    Case("He needs 20 more cups.", "20", True, True),
    Case("He needs 20.", "20", True, False, "`20.` is not all digits, and there is no other"),
    Case("It takes 2/2 = 1 bolt of white, so 2 + 1 = 3 bolts.", "3", True, True),
    Case(
        "The answer is: 5. Then I checked it 3 times.", "5", False, True, "theirs takes the stated one, ours the last"
    ),
    Case("The answer is: 4. No, wait. The answer is: 5", "5", True, False, "theirs takes the first statement"),
    Case("#### 4\nThe answer is: 5", "5", True, True, "the statement goes before the mark"),
    Case("The answer is: 5\n#### 4", "5", False, True),
    Case("x = 5", "5", True, True),
    Case("x=5.", "5", True, True),
    Case("He pays 64 dollars in total.", "64", True, True),
    Case("He pays 64$ in total.", "64", True, False, "`64$` is not all digits"),
    Case("The answer is 64.", "64", True, False, "without the colon it is no statement, and `64.` no word of digits"),
    Case("The answer is 64", "64", True, True),
    Case("answer: 64", "65", False, False),
    # Signs, decimals, fractions, percent
    Case("The answer is: -3", "-3", True, False, "theirs drops the minus sign"),
    Case("The answer is: -3", "3", False, True, "theirs drops the minus sign"),
    Case("The answer is: 2.5", "2.5", True, False, "theirs drops the decimal point: 25"),
    Case("The answer is: 2.5", "25", False, True, "theirs drops the decimal point"),
    Case("The answer is: 18.00", "18", True, False, "theirs reads 1800"),
    Case("He makes 9 * 2 = $18.00", "18", True, False, "theirs reads 1800"),
    Case("It rose by 150%", "150", True, False, "`150%` is no word of digits; the first word has none"),
    Case("0.5 * 120 = 60%", "60", True, True),
    Case("The probability is 1/2", "2", True, False, "ours takes the denominator, as any rule of the last number does"),
    Case(r"The probability is \frac{1}{2}.", "0.5", False, False, "neither reads fractions"),
    Case(r"Therefore $\boxed{27}$.", "27", True, False, "no word of digits, no mark"),
    Case(r"So $x = \boxed{27}$.", "27", True, True),
    Case(r"The total is $\$80{,}000$.", "80000", True, False),
    Case(r"x = \$80{,}000", "80000", True, True),
    # Chinese
    Case("她每天在农贸市场赚 9 * 2 = 18 美元。\n答案是：18", "18", True, True),
    Case("答案是：18", "18", True, True, "theirs: one word, whose digits are kept"),
    Case("答案是：18。", "18", True, True),
    Case("珍妮特每天剩 9 颗鸭蛋。答案是：18", "18", True, False, "theirs takes the 9, the last word of digits"),
    Case(
        "她每天剩下16 - 3 - 4=9颗鸭蛋，所以每天赚18美元。",
        "18",
        True,
        False,
        "after the `=` the word holds 9 and 18: 918",
    ),
    Case("16 - 7 = 9，\n9 * 2 = 18。", "18", True, True),
    Case("利润是80,000美元", "80000", True, True),
    Case("利润为 200,000 - 130,000 = 70,000 美元。", "70000", True, True),
    Case("房子增值了150%，所以是120,000元。", "120000", True, False, "theirs joins all digits of the word: 150120000"),
    Case("答案是：１８", "18", True, False, "full-width digits are digits to Python, and not equal to 18"),
    Case("解为$x=-18$和$x=3$。\n答案是：3", "3", True, True),
    Case("因此，较大的解是$\\boxed{3}$。", "3", True, True, "one word"),
    Case("温度下降了-5度", "-5", True, False, "theirs drops the minus sign"),
    Case("每人2.5公斤", "2.5", True, False, "theirs reads 25"),
    Case("利润是7万美元", "70000", True, False, "theirs reads 7"),
    Case("一共有三十个苹果。", "30", False, False, "numbers in words"),
    Case("我不知道。", "18", False, False),
    # Russian
    Case("Она зарабатывает 9 * 2 = 18 долларов.\nОтвет: 18", "18", True, True),
    Case("Ответ: 18", "18", True, True),
    Case("Ответ: 18.", "18", True, False, "`18.` is no word of digits"),
    Case("Ответ: 80 000 рублей", "80000", True, False, "theirs takes the last group, 000"),
    Case("Он получил 200 000 $ - 130 000 $ = 70 000 $.", "70000", True, False, "theirs takes the first word, 70"),
    Case("Ответ: 80\u00a0000", "80000", True, False, "a no-break space parts words too"),
    Case("Прибыль составила 70.000 долларов", "70000", True, False, "a dot for thousands: ours counts either reading"),
    Case("Ответ: 13,50 доллара", "13.5", True, False, "a decimal comma"),
    Case("Всего 2 125 штук", "2,125", True, False, "a gold answer with a comma equals no digits"),
    Case("Всего = 2125", "2,125", True, False, "a gold answer with a comma equals no digits"),
    Case("Ответ: −5", "-5", True, False, "the sign of minus; theirs finds no word of digits"),
    Case("В день он пробегает 60 * 3 = 180 метров, а в неделю 180 * 3 = 540 метров.", "540", True, True),
    Case("Прибыль 70 тыс. долларов", "70000", True, False, "theirs reads 70"),
    Case("Он не знает ответа.", "3", False, False),
    # Spanish
    Case("Ella gana 9 * 2 = $18 cada día.\n#### 18\nLa respuesta es: 18", "18", True, True),
    Case("La respuesta es: 18", "18", True, True),
    Case("La respuesta es: $18.", "18", True, False),
    Case("Ganó 70.000 dólares", "70000", True, False, "a dot for thousands"),
    Case("Ganó $70,000 = 70.000", "70000", True, True),
    Case("cuesta 1.234,50 €", "1234.5", True, False),
    Case("Pesa 3,5 kg", "3.5", True, False, "a decimal comma"),
    Case("El 20% de 80 es 16", "16", True, True),
    Case("El precio baja un 20 %", "20", True, True),
    Case("Necesita 20 tazas; en la mañana 15 y en la tarde 25.", "20", False, False, "ours takes 25., theirs 15"),
    Case("Respuesta: 20 (veinte)", "20", True, True),
    Case("Necesita 5 litros más que Juan, o sea 12 litros. (ver paso 2)", "12", False, True, "ours takes the 2"),
    Case("Ganó 70 mil dólares", "70000", True, False, "theirs reads 70"),
    Case("El área es 18 cm^2.", "18", True, True),
    Case("La respuesta es: domingo", "7", False, False),
    Case("", "7", False, False),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{number}-{case.gold}" for number, case in enumerate(CASES)])
def test_answer(case: Case) -> None:
    assert same_number(case.text, case.gold) is case.ours
    assert (official_answer(case.text) == official_gold(case.gold)) is case.official


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("The answer is: 1,234.5", "12345"),
        ("#### -7", "7"),
        ("<<2*3=6>>6 apples = 7", "6"),
        ("1 >> ", "1"),
        ("a = ", ""),
        ("3 apples, 4 pears", "4"),
        ("18元。 共计", "18"),
        ("共计 18元。", ""),
        ("１８", "１８"),
        ("", ""),
    ],
)
def test_official_answer(text: str, digits: str) -> None:
    assert official_answer(text) == digits


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("70000", "70000"),
        ("2,125", "2,125"),
        ("It sold 17 books.\n#### 17\nLa respuesta es: 17", "17"),
        ("#### -1,234.5", "-1234.5"),
        ("<<150+9=159>>159.", "159"),
        ("x = $30.", "30"),
        ("30 in all", "30"),
        ("thirty in all", "thirty"),
        ("", ""),
    ],
)
def test_official_gold(answer: str, gold: str) -> None:
    assert official_gold(answer) == gold


def test_the_table_is_about_something() -> None:
    assert len(CASES) >= 60
    assert sum(case.ours != case.official for case in CASES) >= 20
