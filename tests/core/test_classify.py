"""What the classifier promises: it finds domains in any script, abstains where it should, and never varies.

Goal: the promises of core/classify's docstring. Method: small domains in several languages; accuracy on
public data is measured by ``benchmarks.routing``, not here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fieldmesh.core.classify import TEXT_CHARS_MAX, Classifier, merged, training_digest
from fieldmesh.core.model import Domain

MUSHROOMS = Domain(
    name="mushrooms",
    description="Mushrooms: boletus, chanterelle, fly agaric, gills, spores, cap, stem, forest",
    examples=(
        "Which mushrooms can I eat?",
        "Is a fly agaric poisonous?",
        "Where do chanterelles grow?",
        "How do I tell a boletus from a bitter bolete?",
        "The gills are white and the stem has a ring",
        "When is the season for porcini?",
        "What do the spores of this mushroom look like?",
    ),
)
CARS = Domain(
    name="cars",
    description="Cars: engine, gearbox, brakes, tyres, oil, battery, exhaust, workshop",
    examples=(
        "My engine does not start in the cold",
        "How often should I change the oil?",
        "The brakes squeal when I stop",
        "Which tyres do I need in winter?",
        "How do I jump-start a dead battery?",
        "The gearbox is hard to shift",
        "What does the red warning light on the dashboard mean?",
    ),
)


@cache
def trained(*domains: Domain) -> Classifier:
    return Classifier.train(domains)


# --- finding and abstaining --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("Can I eat this mushroom from the forest?", "mushrooms"),
        ("are the gills of a chanterelle yellow", "mushrooms"),
        ("The battery of my engine is empty", "cars"),
        ("new brakes for the winter", "cars"),
    ],
)
def test_a_text_finds_its_domain(text: str, domain: str) -> None:
    found = trained(MUSHROOMS, CARS).classify(text)
    assert found.domain == domain
    assert found.ranking[0][0] == domain
    assert found.confidence > 0.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "?!",
        "qwxz vbnm plkj",
        "What is the longest river in Asia?",
        "Tell me a joke",
        "Write a poem about my grandmother",
        "How do I say good night in Dutch?",
    ],
)
@pytest.mark.parametrize("domains", [(MUSHROOMS, CARS), (MUSHROOMS,)], ids=["two domains", "one domain"])
def test_a_text_like_none_of_the_domains_is_left_to_the_generalist(
    text: str, domains: tuple[Domain, ...]
) -> None:
    assert trained(*domains).classify(text).domain is None


def test_a_single_domain_is_found_too() -> None:
    assert trained(MUSHROOMS).classify("Is this mushroom poisonous?").domain == "mushrooms"


def test_a_domain_can_be_found_by_its_description_alone() -> None:
    bees = Domain(name="bees", description="Beekeeping: hive, honey, swarm, queen, wax, smoker")
    assert trained(bees, CARS).classify("The queen left the hive with a swarm").domain == "bees"


def test_without_domains_it_always_abstains() -> None:
    found = Classifier.train([]).classify("anything at all")
    assert (found.domain, found.confidence, found.ranking) == (None, 0.0, ())


def test_unknown_words_lower_the_confidence() -> None:
    classifier = trained(MUSHROOMS, CARS)
    plain = classifier.classify("Which tyres do I need?").confidence
    diluted = classifier.classify("Which tyres do I need? zork blivet frobozz grue plugh xyzzy").confidence
    assert diluted < plain


# --- scripts -----------------------------------------------------------------------------

SCRIPTS = {
    "Chinese": (
        (
            "这种蘑菇可以吃吗",
            "毒蝇伞有毒吗",
            "鸡油菌长在哪里",
            "怎么辨认牛肝菌",
            "蘑菇的菌褶是白色的",
            "野生蘑菇怎么保存",
            "这种菌子有毒",
        ),
        (
            "发动机冷天打不着火",
            "多久换一次机油",
            "刹车有异响",
            "冬天用什么轮胎",
            "电瓶没电了怎么启动汽车",
            "汽车的刹车片多久换一次",
            "轮胎漏气了",
        ),
        "森林里的蘑菇有毒吗",
        "汽车的轮胎和刹车坏了",
        "唐朝的首都在哪里",
    ),
    "Japanese": (
        (
            "このキノコは食べられますか",
            "ベニテングタケは毒がありますか",
            "マツタケはどこに生えますか",
            "キノコの傘が赤い",
        ),
        (
            "エンジンがかかりません",
            "オイル交換はいつですか",
            "ブレーキから音がします",
            "冬用タイヤはどれですか",
        ),
        "赤いキノコは毒ですか",
        "タイヤとブレーキを交換したい",
        "ピアノを習いたいです",
    ),
    "Thai": (
        ("เห็ดชนิดนี้กินได้ไหม", "เห็ดพิษมีลักษณะอย่างไร", "เห็ดโคนขึ้นที่ไหน", "ครีบใต้หมวกเห็ดมีสีขาว"),
        ("เครื่องยนต์สตาร์ทไม่ติด", "ควรเปลี่ยนน้ำมันเครื่องเมื่อไร", "เบรกมีเสียงดัง", "ยางรถยนต์แบบไหนดี"),
        "เห็ดในป่ามีพิษไหม",
        "เบรกและยางรถยนต์เสีย",
        "ใครแต่งเพลงนี้",
    ),
    "Arabic": (
        ("هل يمكن أكل هذا الفطر؟", "هل هذا الفطر سام؟", "أين ينمو الفطر في الغابة؟", "ما لون خياشيم الفطر؟"),
        (
            "المحرك لا يعمل في البرد",
            "متى أغير زيت السيارة؟",
            "الفرامل تصدر صوتا",
            "أي إطارات أحتاج في الشتاء؟",
        ),
        "هل الفطر في الغابة سام؟",
        "زيت المحرك والفرامل في سيارتي",
        "من كتب هذه القصيدة؟",
    ),
    "Russian": (
        ("Можно ли есть этот гриб?", "Мухомор ядовит?", "Где растут лисички?", "Как узнать белый гриб?"),
        ("Двигатель не заводится", "Когда менять масло?", "Тормоза скрипят", "Какие шины нужны зимой?"),
        "Ядовиты ли эти грибы в лесу?",
        "Скрипят тормоза и нужны новые шины",
        "Кто написал эту песню?",
    ),
    "Hindi": (
        ("क्या यह मशरूम खा सकते हैं?", "क्या यह मशरूम ज़हरीला है?", "मशरूम जंगल में कहाँ उगते हैं?"),
        ("गाड़ी का इंजन चालू नहीं होता", "इंजन का तेल कब बदलें?", "गाड़ी के ब्रेक आवाज़ करते हैं"),
        "जंगल का मशरूम ज़हरीला है क्या?",
        "गाड़ी के इंजन और ब्रेक खराब हैं",
        "यह कविता किसने लिखी?",
    ),
    "Korean": (
        (
            "이 버섯을 먹을 수 있나요?",
            "광대버섯은 독이 있나요?",
            "송이버섯은 어디에서 자라나요?",
            "버섯 갓이 빨개요",
        ),
        (
            "엔진 시동이 안 걸려요",
            "엔진 오일은 언제 교환하나요?",
            "브레이크에서 소리가 나요",
            "브레이크 패드는 언제 바꿔요?",
            "겨울에는 어떤 타이어가 필요해요?",
        ),
        "숲에서 찾은 버섯에 독이 있나요?",
        "타이어와 브레이크를 교환하고 싶어요",
        "이 시는 누가 썼나요?",
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_domains_are_found_in_every_script_spaced_or_not(script: str) -> None:
    mushrooms, cars, about_mushrooms, about_cars, about_neither = SCRIPTS[script]
    classifier = Classifier.train(
        [
            Domain(name="mushrooms", description="", examples=mushrooms),
            Domain(name="cars", description="", examples=cars),
        ]
    )
    assert classifier.classify(about_mushrooms).domain == "mushrooms"
    assert classifier.classify(about_cars).domain == "cars"
    assert classifier.classify(about_neither).domain is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Which TYRES?", "which tyres?"),
        ("Ｗｈｉｃｈ ｔｙｒｅｓ?", "Which tyres?"),
        ("les pneus d'été", "les pneus d'ete"),
        (unicodedata.normalize("NFC", "é à ü"), unicodedata.normalize("NFD", "é à ü")),
        ("ブレーキ", "ﾌﾞﾚｰｷ"),
        ("كِتَاب", "كتاب"),
        ("STRASSE", "straße"),
    ],
)
def test_the_same_words_written_differently_are_the_same(one: str, other: str) -> None:
    classifier = trained(
        replace(CARS, examples=("Which tyres?", "les pneus d'été", "ブレーキ", "كتاب", "Straße", "é à ü"))
    )
    assert classifier.classify(one) == classifier.classify(other)


# --- bounds and determinism --------------------------------------------------------------


def test_only_the_beginning_of_a_long_text_is_read() -> None:
    classifier = trained(MUSHROOMS, CARS)
    head = ("Which tyres do I need in winter? " * TEXT_CHARS_MAX)[:TEXT_CHARS_MAX]
    assert classifier.classify(head + "mushrooms " * 100_000) == classifier.classify(head)


@given(st.text(st.characters(exclude_categories=()), max_size=200))
@settings(max_examples=200)
def test_any_text_gets_an_answer_in_bounds(text: str) -> None:
    found = trained(MUSHROOMS, CARS).classify(text)
    assert 0.0 <= found.confidence <= 1.0
    assert {name for name, _ in found.ranking} == {"mushrooms", "cars"}
    assert sum(share for _, share in found.ranking) == pytest.approx(1.0) or found.confidence == 0.0
    assert found.domain in (None, found.ranking[0][0])


def test_the_order_of_the_domains_does_not_matter() -> None:
    text = "Which oil does my engine need?"
    assert trained(MUSHROOMS, CARS).classify(text) == trained(CARS, MUSHROOMS).classify(text)


def test_two_processes_with_other_hash_seeds_agree_to_the_last_digit() -> None:
    program = (
        "from fieldmesh.core.classify import Classifier\n"
        "from fieldmesh.core.model import Domain\n"
        "domains = [Domain(name='b', description='winter tyres, oil', examples=('my brakes squeal',)),\n"
        "           Domain(name='a', description='mushrooms', examples=('the gills are white', 'a cap'))]\n"
        "print(repr(Classifier.train(domains).classify('are the white brakes of winter squealing?')))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


# --- what is learned ---------------------------------------------------------------------


def test_the_digest_names_what_is_learned() -> None:
    digest = training_digest([MUSHROOMS, CARS])
    assert trained(MUSHROOMS, CARS).digest == digest
    assert training_digest([CARS, MUSHROOMS]) == digest
    assert training_digest([MUSHROOMS]) != digest
    assert training_digest([MUSHROOMS, replace(CARS, examples=(*CARS.examples, "one more"))]) != digest
    assert training_digest([MUSHROOMS, replace(CARS, description="other")]) != digest


def test_the_digest_tells_where_one_text_ends() -> None:
    one = Domain(name="x", description="", examples=("ab", "c"))
    assert training_digest([one]) != training_digest([replace(one, examples=("a", "bc"))])


def test_domains_of_one_name_are_merged_in_any_order() -> None:
    a = Domain(name="x", description="first", examples=("one", "two"))
    b = Domain(name="x", description="second", examples=("two", "three"))
    (both,) = merged([a, b])
    assert both == Domain(name="x", description="first\nsecond", examples=("one", "three", "two"))
    assert merged([b, a]) == (both,)
