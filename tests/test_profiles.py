"""Profile files: what is read, what is refused and in which words, what is written, what ships.

Goal: a user's mistake is named with its file, key and remedy, and nothing is written that cannot be read.
Method: small files, properties over generated profiles, and the sixty questions of data/questions.toml.
"""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fieldmesh import profile_checks, profiles
from fieldmesh.core.classify import Classifier, merged
from fieldmesh.core.errors import InvalidRequest, ModelFileInvalid, ProfileInvalid
from fieldmesh.core.model import Domain, Sampling
from fieldmesh.profile_format import (
    DOMAINS_BYTES_MAX,
    EXAMPLE_CHARS_MAX,
    FILE_BYTES_MAX,
    Adapter,
    Profile,
    dump,
    parse,
)

QUESTIONS = Path(__file__).parent / "data" / "questions.toml"
QUESTIONS_RIGHT_MIN = 54


@pytest.fixture(autouse=True)
def user_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No test sees the profiles of whoever runs it."""
    monkeypatch.setattr(profiles, "user_folder", lambda: tmp_path / "user")
    return tmp_path / "user"


def read(text: str) -> Profile:
    return parse(text.encode(), source="mine.toml")


def refusal(text: str) -> ProfileInvalid:
    with pytest.raises(ProfileInvalid) as caught:
        read(text)
    assert caught.value.message.startswith("mine.toml")
    return caught.value


# --- reading -----------------------------------------------------------------------------


def test_a_name_is_enough() -> None:
    assert read('name = "mine"') == Profile(name="mine")


def test_every_key_is_read() -> None:
    profile = read(
        """
        name = "vet"
        description = "Animals"
        model = "models/vet.gguf"
        chat_template = "{{ messages }}"
        system_prompt = "You are a vet."
        tier = 2
        context_tokens = 4096
        slots = 2
        [sampling]
        temperature = 0
        top_k = 10
        top_p = 0.5
        min_p = 0.1
        repetition_penalty = 1.1
        frequency_penalty = 0.2
        presence_penalty = -0.2
        max_tokens = 100
        stop = ["END"]
        [[adapters]]
        path = "vet.gguf"
        scale = 0.5
        [[domains]]
        name = "animals"
        description = "Sick animals"
        examples = ["My cat limps"]
        """
    )
    assert profile == Profile(
        name="vet",
        description="Animals",
        model="models/vet.gguf",
        chat_template="{{ messages }}",
        system_prompt="You are a vet.",
        tier=2,
        context_tokens=4096,
        slots=2,
        sampling=Sampling(
            temperature=0,
            top_k=10,
            top_p=0.5,
            min_p=0.1,
            repetition_penalty=1.1,
            frequency_penalty=0.2,
            presence_penalty=-0.2,
            max_tokens=100,
            stop=("END",),
        ),
        adapters=(Adapter(path="vet.gguf", scale=0.5),),
        domains=(Domain(name="animals", description="Sick animals", examples=("My cat limps",)),),
    )


def test_the_offer_says_what_the_directory_needs() -> None:
    profile = read('name = "a"\ntier = 3\n[[domains]]\nname = "d"\ndescription = "x"')
    offer = profile.offer("SmolLM2", "abc")
    assert (offer.name, offer.model, offer.fingerprint, offer.tier) == ("a", "SmolLM2", "abc", 3)
    assert offer.domains == profile.domains
    assert not offer.generalist


# --- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ('name = "a"\nslot = 2', "slot", "no key 'slot'. Did you mean slots?"),
        ('name = "a"\n[sampling]\ntemprature = 1', "sampling.temprature", "Did you mean temperature?"),
        (
            'name = "a"\n[[domains]]\nname = "d"\ndescription = "x"\nexample = ["q"]',
            "domains.example",
            "Did you mean examples? Keys of domains: name, description, examples.",
        ),
        ("slots = 2", "name", "name is missing: it must be 1 to 63 letters"),
        ('name = "../etc"', "name", "name is '../etc': it must be 1 to 63 letters"),
        ('name = "a\\n"', "name", "1 to 63 letters"),
        ('name = "a"\nslots = 0', "slots", "slots is 0: it must be a whole number from 1 to 256"),
        ('name = "a"\nslots = 257', "slots", "a whole number from 1 to 256"),
        ('name = "a"\nslots = 2.5', "slots", "slots is 2.5: it must be a whole number"),
        ('name = "a"\nslots = true', "slots", "slots is True: it must be a whole number"),
        ('name = "a"\ntier = 10', "tier", "from 1 to 9"),
        ('name = "a"\ncontext_tokens = 1', "context_tokens", "from 128 to 1048576 tokens"),
        ('name = "a"\nmodel = ""', "model", "text of 1 to 4096 characters"),
        ('name = "a"\nsystem_prompt = 3', "system_prompt", "text of 0 to 16384 characters"),
        ('name = "a"\nsampling = 3', "sampling", "it must be a table"),
        ('name = "a"\n[sampling]\ntemperature = 6', "sampling.temperature", "a number from 0 to 5"),
        ('name = "a"\n[sampling]\ntemperature = nan', "sampling.temperature", "a number from 0 to 5"),
        ('name = "a"\n[sampling]\ntop_k = -1', "sampling.top_k", "from 0 to 1000"),
        ('name = "a"\n[sampling]\nstop = ["x", ""]', "sampling.stop[1]", "text of 1 to 256 characters"),
        ('name = "a"\n[sampling]\nmax_tokens = 2048', "sampling.max_tokens", "less than context_tokens"),
        ('name = "a"\n[[domains]]\nname = "d"', "domains[0].description", "description is missing"),
        ('name = "a"\n[[domains]]\nname = "d d"\ndescription = "x"', "domains[0].name", "1 to 63 letters"),
        (
            'name = "a"\n[[domains]]\nname = "d"\ndescription = "x"\nexamples = ["ok", 3]',
            "domains[0].examples[1]",
            "is 3: it must be text of 1 to 500 characters",
        ),
        (
            'name = "a"\n' + '[[domains]]\nname = "d"\ndescription = "x"\n' * 2,
            "domains",
            "domain d is declared twice",
        ),
        ('name = "a"\n[[adapters]]\nscale = 1', "adapters[0].path", "path is missing"),
        ('name = "a"\n[[adapters]]\npath = "x"\nscale = 9', "adapters[0].scale", "from -8 to 8"),
        ('name = "a"\nadapters = "x"', "adapters", "a list of at most 8 tables"),
        ('name = "a"\nn_gpu_layers = -1', "n_gpu_layers", "from 0 to 10000 layers"),
        ('name = "a"\nmain_gpu = 16', "main_gpu", "from 0 to 15"),
        ('name = "a"\ntensor_split = [1, -1]', "tensor_split[1]", "from 0 to 1000"),
        ('name = "a"\ntensor_split = [0, 0]', "tensor_split", "give each card its share"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_would_be_accepted(
    text: str, field: str, words: str
) -> None:
    error = refusal(text)
    assert error.field == field
    assert words in error.message


def test_invalid_toml_is_named_with_its_line() -> None:
    assert "line 2" in refusal('name = "a"\nslots = = 3').message


def test_bytes_that_are_not_utf8_are_named_with_their_line() -> None:
    with pytest.raises(ProfileInvalid, match=r"mine.toml is not UTF-8: byte 21 \(line 2\)"):
        parse(b'name = "a"\nmodel = "x\xff"', source="mine.toml")


def test_a_file_too_large_is_refused_before_it_is_parsed() -> None:
    assert f"larger than {FILE_BYTES_MAX} bytes" in refusal("#" * (FILE_BYTES_MAX + 1)).message


def test_deep_nesting_is_refused() -> None:
    assert "nested too deeply" in refusal("name = " + "[" * 5000).message


def test_domains_too_large_for_a_directory_row_are_refused() -> None:
    examples = [
        f"{i:04}" + "x" * (EXAMPLE_CHARS_MAX - 4) for i in range(DOMAINS_BYTES_MAX // EXAMPLE_CHARS_MAX + 1)
    ]
    text = f'name = "a"\n[[domains]]\nname = "d"\ndescription = "x"\nexamples = {examples}'
    assert f"at most {DOMAINS_BYTES_MAX}" in refusal(text).message


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_give_a_profile_or_a_coded_error(data: bytes) -> None:
    try:
        assert isinstance(parse(data, source="x"), Profile)
    except ProfileInvalid as error:
        assert error.message.startswith("x")


TOML_VALUES = st.recursive(
    st.none().map(lambda _: "x") | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "path", "z"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case dict():
            return f"{{{', '.join(f'{k} = {toml(v)}' for k, v in value.items())}}}"
        case str():
            return "'" + re.sub(r"[^a-z ]", "", value) + "'"
        case _:
            return repr(value)


@given(st.sampled_from(["name", "model", "slots", "sampling", "adapters", "domains", "tier"]), TOML_VALUES)
@settings(max_examples=300)
def test_any_value_in_any_key_gives_a_profile_or_a_coded_error(key: str, value: object) -> None:
    name = "" if key == "name" else 'name = "a"\n'
    try:
        read(f"{name}{key} = {toml(value)}")
    except ProfileInvalid as error:
        assert error.field


# --- writing -----------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)
NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,8}[A-Za-z0-9])?", fullmatch=True)


@given(
    st.builds(
        Profile,
        name=NAMES,
        description=TEXT,
        model=TEXT,
        chat_template=TEXT,
        system_prompt=TEXT,
        tier=st.integers(1, 9),
        context_tokens=st.integers(300, 5000),
        slots=st.integers(1, 256),
        sampling=st.builds(
            Sampling,
            temperature=st.floats(0, 5),
            max_tokens=st.integers(1, 299),
            stop=st.lists(TEXT, max_size=3).map(tuple),
        ),
        n_gpu_layers=st.integers(0, 10_000),
        main_gpu=st.integers(0, 15),
        tensor_split=st.lists(st.floats(0.001, 1000), max_size=4).map(tuple),
        adapters=st.lists(st.builds(Adapter, path=TEXT, scale=st.floats(-8, 8)), max_size=2).map(tuple),
        domains=st.lists(
            st.builds(Domain, name=NAMES, description=TEXT, examples=st.lists(TEXT, max_size=3).map(tuple)),
            max_size=3,
            unique_by=lambda d: d.name,
        ).map(tuple),
    )
)
def test_what_is_written_is_read_back_the_same(profile: Profile) -> None:
    assert parse(dump(profile).encode(), source="x") == profile


def test_a_profile_is_written_whole_and_not_over_another(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine.toml"
    profiles.write(Profile(name="mine"), path)
    assert profiles.load(str(path)).name == "mine"
    with pytest.raises(ProfileInvalid, match="exists already"):
        profiles.write(Profile(name="other"), path)
    profiles.write(Profile(name="other"), path, replace=True)
    assert profiles.load(str(path)).name == "other"
    assert [p.name for p in path.parent.iterdir()] == ["mine.toml"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileInvalid, match="cannot be written"):
        profiles.write(Profile(name="a"), tmp_path / "file" / "a.toml")


def test_a_profile_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ProfileInvalid, match="slots is 0"):
        profiles.write(Profile(name="a", slots=0), tmp_path / "a.toml")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_found_beside_its_profile(tmp_path: Path) -> None:
    (tmp_path / "vet.gguf").write_bytes(b"GGUF")
    profile = Profile(name="vet", adapters=(Adapter(path="vet.gguf", scale=0.5),), folder=tmp_path)
    assert profiles.adapters(profile) == (Adapter(path=str(tmp_path / "vet.gguf"), scale=0.5),)


def test_an_adapter_that_is_not_there_is_named_with_the_shipped_ones(tmp_path: Path) -> None:
    for path in ("no.gguf", "no-such-name"):
        with pytest.raises(ModelFileInvalid, match=r"no adapter file .*/no.*\.gguf .*profile vet"):
            profiles.adapters(Profile(name="vet", adapters=(Adapter(path=path),), folder=tmp_path))


def test_adapters_are_left_out_where_another_model_is_named(tmp_path: Path) -> None:
    for name in ("own.gguf", "other.gguf", "vet.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    profile = Profile(name="vet", model="own.gguf", adapters=(Adapter(path="vet.gguf"),), folder=tmp_path)
    assert len(profiles.adapters(profile, str(tmp_path / "own.gguf"))) == 1
    assert profiles.adapters(profile, str(tmp_path / "other.gguf")) == ()


def test_shipped_adapters_go_with_the_builtin_model_alone(tmp_path: Path) -> None:
    shipped, own = profiles.load("health"), tmp_path / "own.gguf"
    own.write_bytes(b"GGUF")
    (adapter,) = profiles.adapters(shipped)
    assert Path(adapter.path).is_file()
    assert profiles.adapters(shipped, str(profiles.builtin_model())) == (adapter,)
    assert profiles.adapters(shipped, str(own)) == ()
    assert profiles.adapters(replace(shipped, model="own.gguf", folder=tmp_path)) == ()
    assert profiles.adapters(replace(shipped, model=str(profiles.builtin_model()))) == (adapter,)


def test_a_new_profile_takes_the_users_model_and_questions(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    questions = tmp_path / "q.txt"
    questions.write_text(
        "\ufeff# my questions\n\nWhere do bees live?\nWhere do bees live?\n  What is wax?  \n"
    )
    profile = profiles.new(
        name="bees", gguf=str(tmp_path / "m.gguf"), domain="bee_keeping", examples=questions
    )
    (domain,) = profile.domains
    assert domain.examples == ("Where do bees live?", "What is wax?")
    assert domain.description == "Questions about bee keeping."
    assert profiles.model_path(profile) == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has 0 examples"),
        (b"# only a comment\n", "has 0 examples"),
        (b"ok\n\xff\n", r"not UTF-8 \(line 2\)"),
        (b"ok\n" + b"x" * 501, "line 2 has 501 characters"),
        (b"\n".join(str(i).encode() for i in range(1001)), "has 1001 examples: 1 to 1000"),
        (b"x" * 1_048_577, "larger than 1048576 bytes"),
    ],
    ids=["empty", "comments", "not utf-8", "long line", "too many", "too large"],
)
def test_a_bad_file_of_examples_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "q.txt"
    path.write_bytes(content)
    with pytest.raises(ProfileInvalid, match=words):
        profiles.read_examples(path)


def test_a_missing_file_of_examples_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileInvalid, match=r"nowhere\.txt cannot be read: No such file"):
        profiles.read_examples(tmp_path / "nowhere.txt")


# --- finding -----------------------------------------------------------------------------


def test_the_shipped_profiles_are_found_by_name() -> None:
    assert [f.path.stem for f in profiles.available()] == ["code", "general", "health"]
    assert all(f.shipped and f.profile is not None and not f.problem for f in profiles.available())


def test_a_users_profile_hides_a_shipped_one_of_its_name(user_folder: Path) -> None:
    profiles.write(Profile(name="code", description="mine"), user_folder / "code.toml")
    assert profiles.load("code").description == "mine"
    (found,) = [f for f in profiles.available() if f.path.stem == "code"]
    assert not found.shipped


def test_a_broken_profile_is_listed_with_its_problem(user_folder: Path) -> None:
    user_folder.mkdir()
    (user_folder / "broken.toml").write_text("name = 3")
    (found,) = [f for f in profiles.available() if f.path.stem == "broken"]
    assert found.profile is None
    assert "name is 3" in found.problem


def test_an_unknown_profile_names_what_exists_and_the_nearest() -> None:
    with pytest.raises(
        ProfileInvalid, match=r"no profile 'heath'. Did you mean health\? .*code, general, health"
    ):
        profiles.load("heath")


def test_a_missing_profile_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileInvalid, match=r"x\.toml cannot be read: No such file"):
        profiles.load(str(tmp_path / "x.toml"))


# --- the model ---------------------------------------------------------------------------


def test_the_builtin_model_is_found_without_importing_its_package() -> None:
    pytest.importorskip("gguf")
    found = profiles.model_path(Profile(name="a"))
    assert found.suffix == ".gguf" and found.is_file()
    assert profiles.BUILTIN_PACKAGE not in sys.modules


def test_a_missing_builtin_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "BUILTIN_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(ModelFileInvalid, match=r"make mesh.*FIELDMESH_MODEL"):
        profiles.builtin_model()


def test_an_override_comes_before_the_profiles_model(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    assert profiles.model_path(Profile(name="a"), str(other)) == other
    with pytest.raises(ModelFileInvalid, match="FIELDMESH_MODEL"):
        profiles.model_path(Profile(name="a"), str(tmp_path / "none.gguf"))


def test_a_relative_model_is_looked_for_beside_the_profile(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    profiles.write(Profile(name="a", model="m.gguf"), tmp_path / "a.toml")
    assert profiles.model_path(profiles.load(str(tmp_path / "a.toml"))) == tmp_path / "m.gguf"
    profiles.write(Profile(name="b", model="none.gguf"), tmp_path / "b.toml")
    with pytest.raises(ModelFileInvalid, match="named by profile b"):
        profiles.model_path(profiles.load(str(tmp_path / "b.toml")))


# --- telling profiles apart --------------------------------------------------------------


def shipped() -> list[Profile]:
    return [profiles.load(name) for name in ("general", "code", "health")]


def test_the_shipped_profiles_differ_visibly() -> None:
    general, code, health = shipped()
    assert general.domains == ()
    assert len({p.system_prompt for p in (general, code, health)}) == 3
    assert all(len(p.domains[0].examples) >= 30 for p in (code, health))


def test_sixty_questions_reach_the_right_profile() -> None:
    owners = {d.name: p.name for p in shipped() for d in p.domains}
    classifier = Classifier.train(merged(d for p in shipped() for d in p.domains))
    questions = tomllib.loads(QUESTIONS.read_text())
    learned = {e for p in shipped() for d in p.domains for e in d.examples}
    assert [len(asked) for asked in questions.values()] == [20, 20, 20]
    assert not learned & {q for asked in questions.values() for q in asked}
    wrong = [
        (wanted, question)
        for wanted, asked in questions.items()
        for question in asked
        if owners.get(classifier.classify(question).domain or "", "general") != wanted
    ]
    assert 60 - len(wrong) >= QUESTIONS_RIGHT_MIN, wrong


def test_the_readmes_question_goes_to_the_programmer() -> None:
    tried = profile_checks.try_question(shipped(), "Write a function that adds two numbers")
    assert (tried.profiles, tried.domain) == (("code",), "programming")


def test_a_question_of_no_domain_goes_to_the_generalist() -> None:
    tried = profile_checks.try_question(shipped(), "What is the capital of Bolivia?")
    assert (tried.profiles, tried.domain) == (("general",), "")


def test_an_empty_question_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        profile_checks.try_question(shipped(), " \n")


def test_the_shipped_profiles_are_not_confused_with_each_other() -> None:
    confusion = profile_checks.check(shipped())
    assert confusion.examples == 64
    assert confusion.right >= 48
    assert ("code", "health") not in confusion.between()
    assert ("health", "code") not in confusion.between()


def test_confused_profiles_are_named_with_the_examples() -> None:
    tea = (
        "Which tea has the least caffeine?",
        "How long should green tea steep?",
        "How hot should the water for tea be?",
    )
    pots = ("Which pot is best for tea?", "How do I clean a tea pot?", "How much tea does a pot hold?")
    coffee = "How much caffeine has green tea and how hot should the water for tea be?"
    confusion = profile_checks.check(
        [
            Profile(name="drinks", domains=(Domain(name="tea", description="Tea", examples=tea),)),
            Profile(
                name="shop", domains=(Domain(name="pots", description="Pots", examples=(*pots, coffee)),)
            ),
        ]
    )
    assert (confusion.examples, confusion.too_few) == (7, ("pots", "tea"))
    (miss,) = [m for m in confusion.misrouted if m.example == coffee]
    assert (miss.profile, miss.to_profiles, miss.to_domain) == ("shop", ("drinks",), "tea")
    assert confusion.between()["shop", "drinks"] >= 1


def test_a_domain_that_two_profiles_share_is_no_confusion() -> None:
    domain = Domain(name="tea", description="Tea", examples=("Which tea?", "Green tea or black tea?"))
    confusion = profile_checks.check(
        [Profile(name="a", domains=(domain,)), Profile(name="b", domains=(domain,))]
    )
    assert confusion.shared_domains == ("tea",)
    assert not any(m.to_profiles for m in confusion.misrouted)
