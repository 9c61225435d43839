"""Question/answer conversations made from the docstrings of Python's own standard library.

All of it is plain text processing of the running interpreter's documentation, so the data needs no download
and is the same for the same Python version and seed.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from demo_names import CLASS_MEMBERS, FAMOUS, MODULES, REWORDED, SKIPPED, VERBS
from demo_phrases import (
    ABOUT_TEMPLATES,
    EXAMPLE_TEMPLATES,
    FILLER,
    FOLLOW_EXAMPLE,
    FOLLOW_MODULE,
    FOLLOW_SIGNATURE,
    FOREIGN_NAMES,
    LEADS,
    MODULE_TEMPLATES,
    OFF_TOPIC,
    OFF_TOPIC_FILL,
    OFF_TOPIC_REPLIES,
    REVERSE_TEMPLATES,
    SIGNATURE_TEMPLATES,
    SMALL_TALK,
    SYLLABLES,
    SYSTEM_PROMPTS,
    TAILS,
    TASK_TEMPLATES,
    TASKS,
)

Turn = tuple[str, str]
MAX_ANSWER_CHARS = 330
SHORT_ANSWER_CHARS = 150
FAMOUS_WEIGHT = 5.0


@dataclass
class Fact:
    """One documented name, the ways people write it, and the answers made from its docstring."""

    name: str
    module: str
    kind: str
    signature: str
    answer: str
    imperative: str
    weight: float
    forms: list[str] = field(default_factory=list)

    def signature_answer(self) -> str:
        if not self.signature:
            return f"The signature of {self.name} is not published by Python. {self.module_answer()}"
        return f"The signature is {self.name}{self.signature}."

    def module_answer(self) -> str:
        if self.module == "builtins":
            return f"{self.name} is built in, so you can use it without any import."
        return f"{self.name} is in the {self.module} module. Use it after: import {self.module}"

    def example_answer(self) -> str:
        head = "" if self.module == "builtins" else f"import {self.module}\n\n"
        owner, _, last = self.name.rpartition(".")
        if self.kind == "method":
            return f"With value being a {owner} object:\n\nresult = value.{last}({self._call_arguments()})"
        return f"A minimal use of {self.name}:\n\n{head}result = {self.name}({self._call_arguments()})"

    def _call_arguments(self) -> str:
        inner = self.signature.removeprefix("(").partition(") ->")[0].removesuffix(")")
        parts = [part.strip() for part in inner.split(",")]
        return ", ".join(p for p in parts if p.isidentifier() and p not in ("self", "cls"))


def third_person(verb: str) -> str:
    """Conjugate a docstring's opening imperative: "Join" becomes "joins"."""
    verb = verb.lower()
    if verb.endswith(("s", "sh", "ch", "x", "z")) or verb in ("do", "go"):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


CONJUGATED = {third_person(verb): verb for verb in sorted(VERBS)}


def clean_docstring(doc: str) -> str:
    """The prose of a docstring, without signature lines, markup, examples or tables."""
    doc = re.sub(r"^[\w.]+\([^\n]*\)( *-> *[^\n]*?)?(\.  |\n| -- |: )", "", doc.strip(), count=1)
    while re.match(r"^[\w.]+\([^\n]*\)[^\n]*(\n|$)", doc) and not doc[0].isspace():
        doc = doc.partition("\n")[2].lstrip("\n")
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", doc.strip()):
        stop = re.search(r">>>|::|^\s*[-*=+]|\n\s{2,}|\t|\|", paragraph)
        if stop and kept:
            break
        if stop:
            paragraph = paragraph[: stop.start()]
        ended = paragraph.rstrip().endswith((".", "!", "?", ":"))
        kept.append(paragraph if ended else paragraph + ".")
        if stop:
            break
    text = re.sub(r":\w+:`|`", "", re.sub(r"(?<=\w)-\s*\n\s*", "-", " ".join(kept)))
    return re.sub(r"\s+", " ", text).strip()


def pick_sentences(text: str) -> str:
    """The first one to four whole sentences that fit the answer length."""
    chosen = ""
    sentences = re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z\"'(])", text)
    for sentence in sentences[:4]:
        listing = sentence.endswith(":") or sentence.startswith("Arguments")
        if listing or len(chosen) + len(sentence) > MAX_ANSWER_CHARS:
            break
        chosen = f"{chosen} {sentence}".strip()
    return chosen


def as_statement(prose: str) -> str:
    """Put the imperatives after the first one into the third person too."""
    first, dot, rest = prose.partition(". ")
    first = re.sub(
        r"(^and|,|;| and| or) (return|keep|yield|print|raise|write|convert)(?=[ ,])",
        lambda found: f"{found[1]} {third_person(found[2])}",
        first,
    )
    rest = re.sub(r"(?:(?<=\. )|^)Returns? ", "It returns ", rest)
    rest = re.sub(r"([,;]) (?:then )?return (?!value)", r"\1 it returns ", rest)
    return first + dot + re.sub(r", raise ", ", it raises ", rest)


def describe(name: str, kind: str, prose: str) -> tuple[str, str]:
    """Turn docstring prose into an answer that names its subject; also return its imperative, if it has one."""
    first, _, rest = prose.partition(" ")
    word = first.rstrip(",;").lower()
    if kind == "exception":
        return f"{name} is the exception for this case: {prose[0].lower()}{prose[1:]}", ""
    adverb, lowered = "", prose[0].lower() + prose[1:]
    if word.endswith("ly") and rest.partition(" ")[0] in VERBS:
        adverb, (first, _, rest) = f"{word} ", rest.partition(" ")
        word = first
    if word in CONJUGATED and rest:
        first, word = CONJUGATED[word] + first[len(word) :], CONJUGATED[word]
    if word in VERBS and rest:
        sentence = re.split(r"[.,;:(]\s?", rest)[0].strip()
        imperative = f"{word} {sentence}" if 10 <= len(sentence) <= 80 and first.isalpha() else ""
        return f"{name} {adverb}{third_person(word)}{first[len(word) :]} {as_statement(rest)}", imperative
    states = re.search(r"\b(is|are|will|can|may|implements|returns)\b", prose.split(".")[0])
    if word in ("a", "an", "the") and not states:
        return f"{name} is {lowered}", ""
    noun = first.replace("-", "").isalpha() and first != name.rpartition(".")[2]
    if kind == "class" and noun and not states:
        article = "an" if lowered[0] in "aeio" else "a"
        return f"{name} is {article} {prose if first[1:2].isupper() else lowered}", ""
    return f"{name}: {as_statement(prose)}", ""


def signature_of(obj: object) -> str:
    """The signature as inspect shows it; empty if unknown, too long to read, or with a memory address."""
    try:
        text = str(inspect.signature(obj))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    return "" if len(text) > 90 or "0x" in text or "<" in text or "'>" in text else text


def make_fact(name: str, module: str, obj: object, kind: str) -> Fact | None:
    """A fact for one object, or None if its docstring says too little for an answer."""
    doc = REWORDED.get(name) or inspect.getdoc(obj)
    if not doc or not doc.isascii() or re.match(SKIPPED, name):
        return None
    prose = pick_sentences(clean_docstring(doc))
    if len(prose) < 18 or re.match(r"\w+\(", prose):
        return None
    answer, imperative = describe(name, kind, prose)
    signature = signature_of(obj)
    if len(answer) < SHORT_ANSWER_CHARS and signature:
        answer += f" Its signature is {name}{signature}."
    if len(answer) < SHORT_ANSWER_CHARS:
        place = "Python's built-ins" if module == "builtins" else f"the {module} module"
        answer += f" It is {'an' if kind == 'exception' else 'a'} {kind} from {place}."
    weight = FAMOUS_WEIGHT if name in FAMOUS else 1.0
    return Fact(name, module, kind, signature, answer, imperative, weight)


def module_objects(module_name: str) -> Iterator[tuple[str, object, str]]:
    """Public functions and classes of one module, under the names that people write."""
    module = importlib.import_module(module_name)
    package = module_name.split(".")[0]
    for attribute in sorted(getattr(module, "__all__", None) or dir(module)):
        obj = getattr(module, attribute, None)
        if attribute.startswith("_") or inspect.ismodule(obj) or not callable(obj):
            continue
        name = attribute if module_name == "builtins" else f"{module_name}.{attribute}"
        home = (getattr(obj, "__module__", None) or module_name).split(".")[0].lstrip("_")
        if package != "os" and name not in FAMOUS and home != package:
            continue  # imported from elsewhere, and known there
        if not (inspect.isclass(obj) and issubclass(obj, BaseException)):
            yield name, obj, "class" if inspect.isclass(obj) else "function"
        elif module_name == "builtins":
            yield name, obj, "exception"


def method_objects() -> Iterator[tuple[str, str, object]]:
    """Public methods of the listed classes, as (name, module, object)."""
    for dotted in CLASS_MEMBERS:
        module_name, _, class_name = dotted.rpartition(".")
        module = importlib.import_module(module_name or "builtins")
        owner = getattr(module, class_name)
        for attribute in sorted(vars(owner)):
            if not attribute.startswith("_") and callable(getattr(owner, attribute)):
                yield f"{dotted}.{attribute}", module_name or "builtins", getattr(owner, attribute)


def collect_facts() -> list[Fact]:
    """All facts, each with its unambiguous written forms; well-known names have a higher weight."""
    facts: dict[str, Fact] = {}
    for module_name in MODULES:
        for name, obj, kind in module_objects(module_name):
            fact = make_fact(name, module_name, obj, kind)
            if fact is not None:
                facts.setdefault(name, fact)
    for name, module_name, obj in method_objects():
        fact = make_fact(name, module_name, obj, "method")
        if fact is not None:
            facts.setdefault(name, fact)
    add_written_forms(list(facts.values()))
    return list(facts.values())


def add_written_forms(facts: list[Fact]) -> None:
    """Add the forms in which people type each name; the last part alone only if no other name ends in it."""
    last_parts = Counter(fact.name.rpartition(".")[2] for fact in facts)
    descriptions = Counter(fact.imperative for fact in facts)
    for fact in facts:
        owner, _, last = fact.name.rpartition(".")
        base = [fact.name] * 5 + [f"{fact.name}()"] * 2
        if owner and last_parts[last] == 1:
            base += [last, f"{last}()"]
        fact.forms = base + [f"`{form}`" for form in base[3:]]
        if fact.kind == "method":
            fact.forms += [f"the {last} method of {owner}", f"{owner}'s {last} method"]
        elif fact.kind == "function":
            fact.forms += [f"the {fact.name} function", f"the function {fact.name}"]
        else:
            fact.forms += [f"the {fact.name} class"] * (fact.module != "builtins")
        if descriptions[fact.imperative] > 1:
            fact.imperative = ""


class Conversations:
    """An endless, seeded stream of short conversations about the facts, with some small talk."""

    def __init__(self, facts: list[Fact], seed: int) -> None:
        self.facts = facts
        self.by_name = {fact.name: fact for fact in facts}
        self.weights = [fact.weight for fact in facts]
        self.rng = random.Random(seed)
        self.words = sorted({w for fact in facts for w in re.findall(r"\b[a-z]{3,}\b", fact.answer)})
        self.tasks = [(self.by_name[n], t) for n, ts in TASKS.items() if n in self.by_name for t in ts]

    def __iter__(self) -> Iterator[tuple[str, list[Turn]]]:
        while True:
            yield self.draw()

    def draw(self) -> tuple[str, list[Turn]]:
        """One conversation: an optional system prompt and one or two turns."""
        system = self.rng.choice(SYSTEM_PROMPTS) if self.rng.random() < 0.04 else ""
        pick = self.rng.random()
        if pick < 0.09:
            return system, [self.off_topic()]
        if pick < 0.11:
            return system, [self.small_talk()]
        fact = self.rng.choices(self.facts, self.weights)[0]
        if pick < 0.19:
            fact, task = self.rng.choice(self.tasks)
            return system, [(self.dress(self.rng.choice(TASK_TEMPLATES).format(task)), fact.answer)]
        if pick < 0.24 and fact.imperative:
            question = self.rng.choice(REVERSE_TEMPLATES)
            verb, _, rest = fact.imperative.partition(" ")
            filled = question.format(i=fact.imperative, v=f"{third_person(verb)} {rest}")
            return system, [(self.dress(filled), fact.answer)]
        if pick < 0.29:
            return system, [self.detail(fact)]
        question = self.loose_question(fact) if self.rng.random() < 0.6 else self.ask(ABOUT_TEMPLATES, fact)
        turns = [(question, fact.answer)]
        if pick > 0.90:
            turns.append(self.follow_up(fact))
        return system, turns

    def ask(self, templates: tuple[str, ...], fact: Fact) -> str:
        return self.dress(self.rng.choice(templates).format(self.rng.choice(fact.forms)))

    def loose_question(self, fact: Fact) -> str:
        """A question with random wording, so that the model learns to look at the name alone."""
        rng = self.rng
        name = rng.choice(fact.forms)
        if rng.random() < 0.3:
            tail = rng.choice(TAILS)
            return rng.choice((f"{name}{tail}", f"{rng.choice(LEADS)} {name}{tail}"))
        before, after = self.filler(rng.randint(0, 8)), self.filler(rng.randint(0, 8))
        comma = rng.choice(("", "", ",", ".", ":", ";"))
        text = f"{before} {name}{comma} {after}".strip()
        if before:
            text = text[0].upper() + text[1:]
        return text + rng.choice(("?", ".", "!", "?", ""))

    def filler(self, count: int) -> str:
        """Random words, some followed by a comma."""
        words = [
            self.rare_word() if self.rng.random() < 0.35 else self.rng.choice(FILLER) for _ in range(count)
        ]
        return " ".join(word + "," * (self.rng.random() < 0.08) for word in words)

    def rare_word(self) -> str:
        """A real or made-up word. Together they use every token, so that no token is new to the model later."""
        if self.rng.random() < 0.5:
            return self.rng.choice(self.words)
        return "".join(self.rng.choices(SYLLABLES, k=self.rng.randint(1, 4)))

    def dress(self, text: str) -> str:
        """Vary case, greeting and closing punctuation, as people do."""
        rng = self.rng
        if rng.random() < 0.15:
            text = text[0].lower() + text[1:]
        if rng.random() < 0.15 and text[-1] in "?.":
            text = text[:-1]
        if rng.random() < 0.08:
            text = rng.choice(("Hi, ", "Hello! ", "Please: ", "Quick question: ", "Hey, ", "OK. ")) + text
        if rng.random() < 0.06:
            text += rng.choice((" Thanks!", " Thank you.", " Keep it short.", " I am new to Python."))
        return text

    def detail(self, fact: Fact) -> Turn:
        """A direct question about signature, module or example."""
        pick = self.rng.random()
        if pick < 0.4:
            return self.ask(SIGNATURE_TEMPLATES, fact), fact.signature_answer()
        if pick < 0.7:
            return self.ask(MODULE_TEMPLATES, fact), fact.module_answer()
        return self.ask(EXAMPLE_TEMPLATES, fact), fact.example_answer()

    def follow_up(self, fact: Fact) -> Turn:
        """A second question that only makes sense after the first one."""
        pick = self.rng.random()
        if pick < 0.4:
            return self.dress(self.rng.choice(FOLLOW_SIGNATURE)), fact.signature_answer()
        if pick < 0.7:
            return self.dress(self.rng.choice(FOLLOW_MODULE)), fact.module_answer()
        return self.dress(self.rng.choice(FOLLOW_EXAMPLE)), fact.example_answer()

    def small_talk(self) -> Turn:
        questions, reply = self.rng.choice(SMALL_TALK)
        return self.rng.choice(questions), reply

    def off_topic(self) -> Turn:
        """A request outside the documentation, with a polite reply that fits its kind."""
        rng = self.rng
        if rng.random() < 0.1:
            return self.filler(rng.randint(3, 12)).capitalize() + rng.choice("?."), OFF_TOPIC_REPLIES["world"]
        sort = rng.choice(tuple(OFF_TOPIC))
        fill = {key: rng.choice(values) for key, values in OFF_TOPIC_FILL.items()}
        for key in ("thing", "place", "person", "dish", "language"):
            if rng.random() < 0.4:
                fill[key] = self.rare_word().capitalize() if key != "thing" else self.filler(2)
        fill |= {"a": str(rng.randint(0, 99)), "b": str(rng.randint(0, 99)), "lib": rng.choice(FOREIGN_NAMES)}
        question = rng.choice(OFF_TOPIC[sort]).format(**fill)
        return self.dress(question), OFF_TOPIC_REPLIES[sort].format(**fill)
