"""The built-in rewards on examples written by hand; the judge against a server of its own."""

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vismem_core.answers.reward import Written, parse, score
from vismem_core.errors import ConfigError, RewardError, ServiceError
from vismem_core.files.samples import Sample
from vismem_plugins.rewards.choice import chosen, options
from vismem_plugins.rewards.judge import Judge, grade_in, judge
from vismem_plugins.rewards.number import last_number


def scored(spec: str, text: str, answer: str | None, prompt: str = "what ?") -> float:
    return score(parse([spec]), [Written(text)], [Sample("row", (), prompt, answer)])[0]


@pytest.mark.parametrize(
    ("spec", "text", "answer", "expected"),
    [
        ("exact", " Black\ncat ", "black cat", 1),
        ("exact", "black cat.", "black cat", 0),
        ("exact", "", "black cat", 0),
        ("substring", "It is a BLACK  cat.", "black cat", 1),
        ("substring", "It is a cat, black.", "black cat", 0),
        ("substring", "cat", "black cat", 0),
        ("f1", "The black cat!", "a black cat", 1),
        ("f1", "cat", "black cat", 2 / 3),
        ("f1", "black cat cat", "black cat", 0.8),
        ("f1", "cat cat cat", "cat", 0.5),
        ("f1", "dog", "black cat", 0),
        ("f1", "the", "black cat", 0),
        ("f1", "an", "the", 1),
        ("f1", "theory", "ory", 0),
    ],
)
def test_texts(spec: str, text: str, answer: str, expected: float) -> None:
    assert scored(spec, text, answer) == pytest.approx(expected)


@pytest.mark.parametrize("spec", ["exact", "substring", "f1", "number", "math", "choice"])
@pytest.mark.parametrize("answer", [None, " "])
def test_nothing_to_compare_with_is_an_error(spec: str, answer: str | None) -> None:
    message = f"^reward {spec} failed on sample 'row': the sample has no answer to compare with$"
    with pytest.raises(RewardError, match=message):
        scored(spec, "x", answer, "A. x B. y")


@pytest.mark.parametrize("spec", ["exact:x", "substring:x", "f1:x", "math:x", "choice:x"])
def test_arguments_that_would_be_ignored(spec: str) -> None:
    with pytest.raises(ConfigError, match="takes no argument, not 'x'"):
        parse([spec])


LINES = "Which animal?\nA. cat\nB. black cat\nC. dog\nAnswer with the option's letter."
INLINE = "Which animal is left of the tree? A. cat B. black cat C. dog. Answer with the letter. Be brief."


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (LINES, {"A": "cat", "B": "black cat", "C": "dog"}),
        (INLINE, {"A": "cat", "B": "black cat", "C": "dog"}),
        ("Which? (A) cat (B) dog", {"A": "cat", "B": "dog"}),
        ("Which?\n(a) cat\n(b) dog\n", {"A": "cat", "B": "dog"}),
        ("Which?\n  a) St. Louis\n  b) New York", {"A": "st. louis", "B": "new york"}),
        ("**A.** 1.5 m\n**B.** 2 m", {"A": "1.5 m", "B": "2 m"}),
        ("A: cat\nB: dog\nC: both A. and B.", {"A": "cat", "B": "dog", "C": "both a. and b"}),
        ("Which letter? A. C\nB. A\nC. B", {"A": "c", "B": "a", "C": "b"}),
        ("A. Smith asks: which? A. cat B. dog", {"A": "cat", "B": "dog"}),
        ("Which animal is it?", {}),
        ("A. only one", {}),
        ("B. cat C. dog", {}),
    ],
)
def test_options_of_a_prompt(prompt: str, expected: dict[str, str]) -> None:
    assert options(prompt) == expected


@pytest.mark.parametrize(
    "text",
    [
        "B", "b", "b)", "(B)", "B.", "**B**", "(b).", "Option B", "answer: b", "B. black cat", "B) black cat",
        "**B.** black cat", "(B) because it is black", "The answer is (B).", "The answer is **B**.", "Answer: B",
        "The correct answer is option B because it is black.", "So the answer is b.", r"The answer is \boxed{B}",
        r"It is \boxed{B}.", "A is wrong. The answer is B", "The answer is A. No, the answer is B.",
        "black cat", "Black cat.", "It is a black cat.", "The answer is black cat.", "I choose B", "I think it is (B)",
        "A black cat is there.", "It's B: the black cat", "(A) cat. Wait. The answer: (B)",
        "B. It is no dog.", r"Not C. The answer is \boxed{B}.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("answer", ["B", "(b)", "black cat", "B. black cat"])
@pytest.mark.parametrize("prompt", [LINES, INLINE])
def test_the_right_option(prompt: str, answer: str, text: str) -> None:
    assert scored("choice", text, answer, prompt) == 1
    assert scored("choice", text, "C", prompt) == 0


@pytest.mark.parametrize(
    "text",
    ["", "A", "C)", "D", "cat", "dog", "the answer is (C)", "B or C", "A, B, C", "cat, black cat, dog", "bird",
     "The answer is a dog.", "It is a dog.", "Best guess: none", "(B) no. The answer is C.", "Bob", "A dog"],
)  # fmt: skip
def test_other_options(text: str) -> None:
    assert scored("choice", text, "B", LINES) == 0


@pytest.mark.parametrize(
    ("text", "answer", "prompt", "expected"),
    [
        ("A", "A", "Which? A. B B. A", 1),
        ("A", "B", "Which? A. B B. A", 0),  # a letter goes before a text
        ("vitamin C", "A", "Which?\nA. vitamin C\nB. iron\nC. zinc", 1),
        ("It has vitamin C.", "A", "Which?\nA. vitamin C\nB. iron\nC. zinc", 1),
        ("I choose A.", "A", LINES, 1),
        ("**A** is right", "A", LINES, 1),
        (r"\boxed{A} is right", "A", LINES, 1),
        ("Straße", "A", "Which?\nA. Straße\nB. Haus", 1),
        ("The answer is a dog.", "C", LINES, 1),
        ("3", "B", "How many?\nA. 2\nB. 3", 1),
        ("13", "B", "How many?\nA. 2\nB. 3", 0),
    ],
)
def test_letters_and_texts_that_look_alike(text: str, answer: str, prompt: str, expected: float) -> None:
    assert scored("choice", text, answer, prompt) == expected


@pytest.mark.parametrize("text", ["B or C", "(A), (B)", "a dog or a black cat", "C, the black cat", "Best guess"])
def test_no_option_or_several(text: str) -> None:
    assert chosen(text, options(LINES)) is None


@pytest.mark.parametrize(
    ("answer", "prompt", "message"),
    [
        ("A", "Which animal is it?", "the prompt lists no options"),
        ("D", LINES, "the sample's answer 'D' is none of the options A, B, C"),
        ("bird", LINES, "'bird' is none of the options"),
    ],
)
def test_questions_without_the_right_option(answer: str, prompt: str, message: str) -> None:
    with pytest.raises(RewardError, match=f"reward choice failed on sample 'row': .*{message}"):
        scored("choice", "A", answer, prompt)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", 12), ("There are 3 cats and 4 dogs.", 4), ("-3", -3), ("−3", -3), ("+3", 3), ("it is -0.5.", -0.5),
        ("1,000", 1000), ("1,234,567.5 m", 1234567.5), ("1,2", 2), ("$1,000", 1000), ("-$5", -5), (".5", 0.5),
        ("1/2", 0.5), ("-1/4", -0.25), ("3 / 4", 0.75), ("1,000/2,000", 0.5), (r"\frac{1}{2}", 0.5),
        (r"-\dfrac{3}{4}", -0.75), ("50%", 0.5), ("50 %", 0.5), (r"50\%", 0.5), ("-5%", -0.05), ("1{,}000", 1000),
        ("10-20", 20), ("5 - 3", 3), ("5 -3", -3), ("12 cm2", 12), ("H2O", None), ("v1.2", None), ("2e3", 2000),
        ("2e-3", 0.002), ("2e9999999999", 2), ("**5**", 5), ("(5)", 5), ("=5", 5), ("answer is...5", 5), ("答案是5", 5),
        ("5.", 5), ("5th", 5), ("none", None), ("", None), ("1/0", None), ("00", 0), ("row_1", None),
    ],
)  # fmt: skip
def test_the_last_number(text: str, expected: float | None) -> None:
    found = last_number(text)
    assert found is expected if expected is None or found is None else float(found) == expected


@pytest.mark.parametrize(
    ("spec", "text", "answer", "expected"),
    [
        ("number", "It is 0.5", "1/2", 1),
        ("number", "50%", "0.5", 1),
        ("number", "50", "50%", 0),
        ("number", "3.0", "3", 1),
        ("number", "0.1", "0.1000001", 0),
        ("number", "0.30000000000000004", "0.3", 0),
        ("number", "three", "3", 0),
        ("number", "1/0", "3", 0),
        ("number", "3", "-3", 0),
        ("number", "9" * 5000, "3", 0),
        ("number:0.05", "105", "100", 1),
        ("number:0.05", "95", "100", 1),
        ("number:0.05", "105.001", "100", 0),
        ("number:0.05", "-105", "-100", 1),
        ("number:0.05", "0.001", "0", 0),
        ("number:0.05", "0", "0", 1),
    ],
)
def test_numbers(spec: str, text: str, answer: str, expected: float) -> None:
    assert scored(spec, text, answer) == expected


@pytest.mark.parametrize("argument", ["x", "-0.1", "1", "nan", "5%", "1/0"])
def test_bad_tolerances(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"takes a relative tolerance from 0 to 1, .*not '{argument}'"):
        parse([f"number:{argument}"])


def test_a_reference_without_a_number() -> None:
    with pytest.raises(RewardError, match="sample 'row': there is no number in the sample's answer 'three'"):
        scored("number", "3", "three")


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("0.5", r"$\frac{1}{2}$", 1),
        (r"So it is $\frac{2}{4}$.", "1/2", 1),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$", 1),
        ("$1+x$", "x+1", 1),
        (r"\sqrt{12}", r"2\sqrt{3}", 1),
        ("2", r"2\sqrt{3}", 0),
        ("$x+2$", "x+1", 0),
        ("1,000", "1000", 1),
        ("50%", "0.5", 1),
        ("I do not know", "3", 0),
        ("", "3", 0),
        ("$", "3", 0),
        (r"\frac{", "3", 0),
    ],
)
def test_mathematics(text: str, answer: str, expected: float) -> None:
    assert scored("math", text, answer) == expected


def test_a_reference_without_mathematics() -> None:
    with pytest.raises(RewardError, match="sample 'row': math-verify reads no mathematics in 'black cat'; write"):
        scored("math", "3", "black cat")


def test_mathematics_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r'reward math needs math-verify: pip install "math-verify>=0\.7"'):
        parse(["math"])


OWN = "VALUE = 3\ndef long(answers, samples): return [float(len(a.ids) > 2) for a in answers]\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "vm_own.py").write_text(OWN)
    (tmp_path / "vm_torn.py").write_text("1 / 0\n")
    yield
    sys.modules.pop("vm_own", None)


def test_a_function_of_ones_own(own: None) -> None:
    answers, samples = [Written("", (1, 2, 3)), Written("", (1,))], [Sample(name, (), "?") for name in "ab"]
    assert score(parse(["call:vm_own:long"]), answers, samples) == [1, 0]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("", "reward call takes package.module:function"),
        ("vm_own", "reward call takes package.module:function, .*not 'vm_own'"),
        ("vm_lost:long", "call:vm_lost:long does not load: .*No module named 'vm_lost'; set PYTHONPATH to its folder"),
        ("vm_own:lost", "call:vm_own:lost does not load: AttributeError: .*'lost'$"),
        ("vm_torn:x", "does not load: ZeroDivisionError: division by zero$"),
        ("vm_own:VALUE", "reward call:vm_own:VALUE is int, not a function"),
    ],
)
def test_functions_that_do_not_load(own: None, argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse([f"call:{argument}"])


@dataclass
class Endpoint:
    """A server that gives each request what ``reply`` says: a status and a body."""

    url: str = ""
    reply: Callable[[int, Any], tuple[int, Any]] = lambda number, body: (200, completion("7"))
    models: tuple[str, ...] = ("only",)
    asked: list[Any] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


def completion(content: str | None) -> Any:
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    state = Endpoint()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": name} for name in state.models]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.asked.append(body)
                state.keys.append(self.headers["Authorization"])
                number = len(state.asked)
            self._send(*(state.reply(number, body) if self.path == "/v1/chat/completions" else (404, "no such path")))

        def _send(self, status: int, body: Any) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            with suppress(BrokenPipeError, ConnectionResetError):  # the judge may have given up
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


ROWS = [Sample(f"row{number}", (), f"question {number} ?", str(number)) for number in range(20)]
TOLD = [Written(f"told {number}") for number in range(20)]


def told_number(body: Any) -> int:
    return int(json.loads(body["messages"][1]["content"])["answer"].split()[1])


def test_the_judge_grades_in_order(endpoint: Endpoint) -> None:
    endpoint.reply = lambda number, body: (200, completion(f"Grade: {told_number(body) / 2}/10"))
    assert score(parse([f"judge:{endpoint.url}/"]), TOLD, ROWS) == [number / 20 for number in range(20)]
    body = min(endpoint.asked, key=told_number)
    assert (body["model"], body["temperature"]) == ("only", 0)
    asked = {"question": "question 0 ?", "reference": "0", "answer": "told 0"}
    assert json.loads(body["messages"][1]["content"]) == asked
    assert set(endpoint.keys) == {None}


def test_the_judge_works_at_several_answers_at_once(endpoint: Endpoint) -> None:
    meeting = threading.Barrier(4)

    def together(number: int, body: Any) -> tuple[int, Any]:
        meeting.wait(timeout=10)  # breaks if requests come one by one
        return 200, completion("10")

    endpoint.reply = together
    assert Judge(endpoint.url, "m", patience=0, workers=4)(TOLD[:4], ROWS[:4]) == [1, 1, 1, 1]


def test_the_judges_model_and_key(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    endpoint.models = ("one", "two")
    assert score(parse([f"judge:{endpoint.url}#org/two"]), TOLD[:1], ROWS[:1]) == [0.7]
    assert (endpoint.asked[0]["model"], endpoint.keys) == ("org/two", ["Bearer secret"])
    with pytest.raises(RewardError, match=f"serves one, two; choose one as {endpoint.url}#NAME"):
        score(parse([f"judge:{endpoint.url}"]), TOLD[:1], ROWS[:1])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_the_judge_tries_again(endpoint: Endpoint, status: int) -> None:
    endpoint.reply = lambda number, body: (status, "busy") if number < 3 else (200, completion("7"))
    assert Judge(endpoint.url, "m", pause=0.01)(TOLD[:1], ROWS[:1]) == [0.7]
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize(
    ("replied", "patience", "waited"),
    [(True, 100.0, [1, 2, 4, 8, 16, 30, 30, 9]), (True, 6.0, [1, 2, 3]), (False, 100.0, [1, 2, 4, 3])],
)
def test_the_judge_waits_longer_each_time(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, replied: bool, patience: float, waited: list[float]
) -> None:
    """Up to half a minute, as long as patience lasts; one that never replied is not waited for so long."""
    pauses: list[float] = []
    monkeypatch.setattr("vismem_plugins.rewards.judge.time", SimpleNamespace(monotonic=lambda: sum(pauses)))
    endpoint.reply = lambda number, body: (500, "down")
    judged = Judge(endpoint.url, "m", patience, _known=replied)
    judged._given_up = SimpleNamespace(wait=pauses.append)  # type: ignore[assignment]
    with pytest.raises(ServiceError, match=r'/chat/completions fails for .* seconds .*: HTTP 500: "down"; .*--resume'):
        judged._ask("/chat/completions", {})
    assert pauses == waited
    assert len(endpoint.asked) == len(pauses) + 1


def test_patience_is_a_setting(endpoint: Endpoint) -> None:
    (part,) = parse([f"judge:{endpoint.url}#m"], 7.0).parts  # type: ignore[attr-defined]
    assert part.reward.patience == 7.0  # type: ignore[attr-defined]


def bad_row(content: Any, status: int = 200) -> Callable[[int, Any], tuple[int, Any]]:
    """Row 2 gets ``content``, the others a grade."""
    return lambda number, body: (status, content) if told_number(body) == 2 else (200, completion("7"))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (bad_row(completion("I cannot\ngrade this")), r"the judge replied 'I cannot\\ngrade this' instead of a grade"),
        (bad_row(completion(None)), "sent no chat completion"),
        (bad_row({"error": "overloaded"}), "sent no chat completion: .*overloaded"),
        (bad_row(b"<html>"), "/chat/completions does not reply with JSON"),
        (bad_row("no\n key", 401), "/chat/completions refuses with HTTP 401: .*key"),
    ],
)
def test_bad_replies_are_errors(endpoint: Endpoint, reply: Any, message: str) -> None:
    endpoint.reply = reply
    with pytest.raises(RewardError, match=f"^reward judge:{endpoint.url}#m failed on sample 'row2': .*{message}") as it:
        score(parse([f"judge:{endpoint.url}#m"]), TOLD[:4], ROWS[:4])
    assert "\n" not in str(it.value)


def test_an_endpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    lost = Judge(url, "m", patience=0.05, pause=0.01)
    with pytest.raises(ServiceError, match=f"^{url}/.* fails for 0.05 seconds .*refused"):
        score(lost, TOLD[:2], ROWS[:2])


def test_an_endpoint_that_is_silent(endpoint: Endpoint) -> None:
    over = threading.Event()
    endpoint.reply = lambda number, body: (200, completion("7" if over.wait(3) else "8"))
    with pytest.raises(ServiceError, match=r"fails for 0 seconds \(1 tries\): .*timed out"):
        Judge(endpoint.url, "m", timeout=0.2, patience=0)(TOLD[:1], ROWS[:1])
    over.set()


@pytest.mark.parametrize("argument", ["", "127.0.0.1:8000", "file:///etc/passwd", "http://", "#model"])
def test_bad_urls(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"^judge takes a URL, as in judge:http"):
        judge(argument)


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("7", 0.7), ("0", 0), ("10", 1), ("7.5", 0.75), ("**8**", 0.8), ("Grade: 7/10", 0.7), ("10/10.", 1),
        ("6 out of 10", 0.6), ("<think>3 or 4?</think>\n4", 0.4), ("7. Nearly right.", 0.7), ("7/10, so 7", 0.7),
    ],
)  # fmt: skip
def test_grades(reply: str, grade: float) -> None:
    assert grade_in(reply) == grade


@pytest.mark.parametrize(
    "reply", ["", "good", "11", "-3", "7/100", "0/100", "7/10.5", "3 or 4", "0-10", "<think>7</think>", "/10"]
)
def test_no_grades(reply: str) -> None:
    with pytest.raises(RewardError, match="instead of a grade from 0 to 10"):
        grade_in(reply)
