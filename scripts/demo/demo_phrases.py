"""Wordings of the demo model's training conversations."""

from __future__ import annotations

# fmt: off
ABOUT_TEMPLATES: tuple[str, ...] = (
    "What does {} do?", "What does {} do?", "What does {} do in Python?", "What is {}?", "What is {} for?",
    "What is {} used for?", "What's {}?", "Whats {}", "What do I use {} for?", "What can I do with {}?",
    "Explain {}.", "Explain {} to me.", "Can you explain {}?", "Please explain what {} does.", "Describe {}.",
    "Can you describe {} briefly?", "Tell me about {}.", "Tell me what {} does.",
    "Tell me something about {}.", "How do I use {}?", "How does {} work?", "How is {} used?",
    "How would I use {}?", "{}?", "{}", "{} please.", "{}: what is it?", "{} - what does it do?",
    "I want to know what {} does.", "I do not understand {}.", "I saw {} in some code. What does it do?",
    "In Python, what does {} do?", "Could you tell me what {} is?", "Give me a short description of {}.",
    "Give me a summary of {}.", "Summarize {}.", "Help me understand {}.", "Help with {}.",
    "Help me with {}, please.", "When should I use {}?", "When do I need {}?", "Why use {}?",
    "Why would I use {}?", "What happens when I call {}?", "What is the purpose of {}?",
    "What's the point of {}?", "What is the meaning of {}?", "Do you know {}?", "Do you know what {} does?",
    "Define {}.", "Show me what {} does.", "What will {} do for me?", "I need information on {}.",
    "I am reading about {}. What is it?", "Documentation of {}", "Show the documentation for {}.", "docs {}",
    "Python {}", "python {} meaning", "Could you explain how {} works?", "What exactly does {} do?",
    "What is {} good for?", "Is {} useful? What does it do?", "So {} does what?",
    "My code calls {}. What does that do?", "A friend uses {} a lot. What is it?",
    "I never used {}. How does it work?", "Teach me {}.", "Let's talk about {}.", "Next: {}.", "And {}?",
    "What about {}?", "Say what {} does.",
)

# Any lead, a name, any tail: far more wordings than a list of whole sentences.
LEADS: tuple[str, ...] = (
    "Yesterday someone showed me", "In our project there is", "The tutorial says to call", "My teacher likes",
    "We were told about", "There is a line with", "This script contains", "I have a question about",
    "A book recommends", "The next chapter is on", "My boss wants me to use", "Everyone talks about",
    "I found", "Somewhere in the file I see", "The old program uses", "I must present",
    "For homework I have to study", "I am stuck at", "Let me ask you about", "On page ten it says",
    "Reviewing a patch, I noticed", "You surely know", "Today's word is", "My notes only say",
    "Please look at", "Could we discuss", "It would be nice to understand", "Honestly I cannot follow",
    "The error came from", "I was asked in an interview about", "Before lunch I want to learn",
    "My editor suggests", "Is there anything special about", "Would you mind going over", "Imagine you teach",
    "Compare nothing, only present", "People call", "Once more:", "Since I need", "Because of",
)
TAILS: tuple[str, ...] = (
    ", what for?", ", any idea?", " and I am lost.", ", what is going on there?", ", what is that thing?",
    "; please enlighten me.", " but why?", ". What is the idea?", ", so what should I expect?",
    ". Is that magic?", ", care to say more?", ". What does one get from it?", ", in one or two sentences.",
    ", as simple as possible.", " - any hints?", ". What comes out of it?", ", and what would that be?",
    ". How come?", ", tell a newbie.", ", what is the story?", ". Could you comment?",
    ", do you have details?", ". I would like to hear more.", " right now.", ", whatever it is.",
    ". Just the basics.", "; what is its effect?", ". What result will I see?", ", is it important?",
    ". Your turn!", "?", ".", "!", "...",
)

# Drawn at random around a name, these teach that the name alone decides the answer.
_FILLER = """
    actually after again all already also always an and another any anyone anything are ask at away back bad
    be because been before best better big bit both boss but buy by came can chat class code come could day
    days did different do doc does done down each early easy else end enough even ever every example face fact
    far feel few file find fine first for friend from full fun game gave get give go going good got great
    guess had half hand happy hard has have he hear help her here high him his home hope hour house how idea
    if important in instead is it just keep kind knew know last late later learn least leave less let life
    like line little long look lot love made make many may maybe me mean might mind minute money more morning
    most much must my name near need never new next nice night no not nothing now of off often old on once one
    only open or other our out over own page part people perhaps place play point probably problem program
    project put quick quite read ready real really reason rest run said same say school see seem send she
    should show side simple since small so some someone something soon sorry sort speak start still stop story
    such sure take talk team tell than thank that the their them then there these they thing things think this
    those though thought time today together told tomorrow too tool top true try two under until up us use
    used useful usual very wait want was watch way we week well went were what when where whether which while
    who whole why will wish with without wonder word words work world would wrong year yes yesterday yet you
    young your
"""
FILLER: tuple[str, ...] = tuple(_FILLER.split())

_SYLLABLES = """
    a ab ac al an ap ar as at au ba be bi bl bo br bu ca ce ch ci cl co con cr cu da de di do dr du ea ed el
    em en er es et ev ex fa fe fi fl fo fr fu ga ge gh gi gl go gr gu ha he hi ho hu ia ic id ie ig il im in
    ing ion ir is it ity ive ja jo ju ka ke ki kn ko la le li lo lu ly ma me ment mi mo mu na ne ness ni no nu
    ob oc od of ol om on oo op or os ot ou ow pa pe ph pi pl po pr pu qua que ra re ri ro ru sa sc se sh si sk
    sl sm sn so sp st str su sw ta te th ti tion to tr tu tw ty ul um un up ur us ut va ve vi vo wa we wh wi
    wo wr ya ye za ze
"""
SYLLABLES: tuple[str, ...] = tuple(_SYLLABLES.split())

REVERSE_TEMPLATES: tuple[str, ...] = (
    "Which function {v}?", "What {v}?", "Which part of the standard library {v}?", "How do I {i}?",
    "How can I {i}?", "How do I {i} in Python?", "What should I use to {i}?", "I want to {i}. What do I use?",
    "I need to {i}.", "Name something that {v}.", "Python: {i}", "What is the call that {v}?",
)

TASK_TEMPLATES: tuple[str, ...] = (
    "How do I {}?", "How do I {} in Python?", "How can I {}?", "What should I use to {}?",
    "What is a way to {}?", "I want to {}.", "I need to {}. What do I use?", "Which function lets me {}?",
    "Is there a function to {}?", "Show me how to {}.", "Python: how to {}?", "Tell me how to {}.",
    "Please help me {}.", "What is the best way to {}?",
)

# Everyday wordings of what well-known names do.
TASKS: dict[str, tuple[str, ...]] = {
    "os.path.join": ("join two paths", "build a file path from parts", "combine a folder and a file name"),
    "len": ("count the items of a list", "get the length of a string", "know how long a list is"),
    "sorted": ("sort a list", "get a sorted copy of a list", "put items in order"),
    "list.sort": ("sort a list in place",),
    "list.append": ("add an item to a list", "put something at the end of a list"),
    "list.extend": ("add many items to a list", "append one list to another"),
    "str.split": ("split a string", "cut a string into words", "break text at a separator"),
    "str.join": ("join strings", "glue a list of strings together", "turn a list of words into one string"),
    "str.strip": ("remove whitespace around a string", "trim a string"),
    "str.replace": ("replace text in a string", "swap a word in a string"),
    "str.upper": ("make a string uppercase",), "str.lower": ("make a string lowercase",),
    "str.startswith": ("check how a string begins", "test a prefix"),
    "json.dumps": ("convert an object to JSON", "make a JSON string", "turn a dict into JSON"),
    "json.loads": ("parse JSON", "read a JSON string", "decode JSON text"),
    "json.load": ("read a JSON file", "load JSON from a file"), "json.dump": ("write JSON to a file",),
    "os.listdir": ("list the files in a folder", "see what is in a directory"),
    "os.makedirs": ("create nested directories", "create a folder with all its parents"),
    "os.mkdir": ("create a directory", "make a folder"), "os.remove": ("delete a file", "remove a file"),
    "os.rename": ("rename a file",), "os.getcwd": ("get the current directory", "find the working directory"),
    "os.walk": ("walk through a directory tree", "visit all files under a folder"),
    "os.path.exists": ("check if a file exists", "test whether a path exists"),
    "os.path.isfile": ("check if a path is a file",), "os.path.isdir": ("check if a path is a directory",),
    "os.path.basename": ("get the file name from a path",), "os.path.splitext": ("get a file extension",),
    "os.getenv": ("read an environment variable", "get an environment variable"),
    "shutil.copy": ("copy a file",), "shutil.copytree": ("copy a directory", "copy a whole folder"),
    "shutil.rmtree": ("delete a directory with its contents", "remove a folder and everything in it"),
    "shutil.move": ("move a file", "move a folder elsewhere"),
    "shutil.which": ("find a program on the path",),
    "subprocess.run": ("run a command", "start another program", "run a shell command"),
    "random.choice": ("pick a random item", "choose a random element from a list"),
    "random.shuffle": ("shuffle a list", "mix up a list"),
    "random.randint": ("get a random integer", "roll a die"),
    "random.sample": ("pick several different random items",), "math.sqrt": ("compute a square root",),
    "math.factorial": ("compute a factorial",), "math.gcd": ("find the greatest common divisor",),
    "math.ceil": ("round up",), "math.floor": ("round down",), "re.search": ("find a pattern in text",),
    "re.sub": ("replace a pattern in text",), "re.findall": ("find all matches of a pattern",),
    "time.sleep": ("pause my program", "wait a few seconds"),
    "time.time": ("get the current time in seconds",),
    "datetime.datetime.now": ("get the current date and time",),
    "collections.Counter": ("count how often things occur", "count words"),
    "collections.defaultdict": ("have a dictionary with default values",),
    "collections.deque": ("have a fast double-ended queue",),
    "collections.namedtuple": ("make a tuple with named fields",),
    "itertools.chain": ("loop over several lists in a row",),
    "enumerate": ("loop with an index", "number the items"),
    "itertools.permutations": ("get all orderings of a list",), "zip": ("loop over two lists together",),
    "itertools.combinations": ("get all pairs from a list",),
    "functools.lru_cache": ("cache function results",), "functools.reduce": ("fold a list into one value",),
    "functools.partial": ("fix some arguments of a function",), "heapq.nlargest": ("get the largest items",),
    "heapq.heappush": ("push onto a heap",), "copy.deepcopy": ("make a deep copy", "copy nested objects"),
    "glob.glob": ("find files by pattern",), "csv.reader": ("read a CSV file",),
    "csv.writer": ("write a CSV file",), "pickle.dumps": ("pickle an object",),
    "base64.b64encode": ("encode data as base64",), "uuid.uuid4": ("make a random UUID",),
    "statistics.mean": ("compute the average", "find the mean of numbers"),
    "sum": ("add up a list of numbers",), "statistics.median": ("find the median",),
    "max": ("find the biggest item",), "min": ("find the smallest item",),
    "isinstance": ("check the type of an object",), "open": ("open a file", "read a file"),
    "print": ("print text", "show something on the screen"), "input": ("read what the user types",),
    "range": ("loop over numbers", "count from 0 to 10"), "reversed": ("loop backwards",),
    "round": ("round a number",), "abs": ("get an absolute value",),
    "dict.get": ("look up a key with a default",), "dict.items": ("loop over the keys and values of a dict",),
    "dict.update": ("merge a dict into another",), "set.union": ("combine two sets",),
    "tempfile.mkdtemp": ("create a temporary directory",),
    "urllib.parse.urlparse": ("parse a URL", "split a URL"), "sqlite3.connect": ("open a SQLite database",),
    "secrets.token_hex": ("make a random token",), "textwrap.wrap": ("wrap long text",),
    "textwrap.dedent": ("remove common indentation",), "asyncio.gather": ("run several coroutines together",),
    "asyncio.run": ("run a coroutine", "start an asyncio program"),
    "sys.exit": ("stop my program", "quit a script"), "threading.Thread": ("start a thread",),
    "logging.getLogger": ("get a logger",), "dataclasses.dataclass": ("make a data class",),
    "traceback.print_exc": ("print an exception",), "contextlib.suppress": ("ignore an exception",),
    "timeit.timeit": ("time a piece of code",),
}

SIGNATURE_TEMPLATES: tuple[str, ...] = (
    "What is the signature of {}?", "Show the signature of {}.", "Which arguments does {} take?",
    "What parameters does {} accept?", "How do I call {}?", "Signature of {}?", "Arguments for {}?",
)

MODULE_TEMPLATES: tuple[str, ...] = (
    "Which module is {} in?", "Where do I import {} from?", "What do I import for {}?",
    "In which module is {}?", "Where does {} live?", "Do I need an import for {}?",
)

EXAMPLE_TEMPLATES: tuple[str, ...] = (
    "Give me an example of {}.", "Show an example of {}.", "Example for {}?", "Show me a call of {}.",
    "How does a call of {} look?", "Write a line of code with {}.",
)

FOLLOW_SIGNATURE: tuple[str, ...] = (
    "Show its signature.", "What is its signature?", "What arguments does it take?", "And the signature?",
    "How do I call it?", "Which parameters does it have?", "show signature",
)

FOLLOW_MODULE: tuple[str, ...] = (
    "Which module is it in?", "Where do I import it from?", "What module is that?", "Do I have to import it?",
    "Where does it live?", "And which module?",
)

FOLLOW_EXAMPLE: tuple[str, ...] = (
    "Give a short example.", "Show me an example.", "Can you give me an example?", "And an example?",
    "How would a call look?", "example please", "Show some code.",
)

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.", "You are a helpful assistant. Answer briefly.",
    "You are a Python expert.", "Answer questions about Python.",
)

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Hello", "Hi", "Hello!", "Hi there", "Hey", "Good morning", "hello there", "Good evening!",
            "hey there!", "Hi!", "Greetings", "hello, how are you?", "How are you?",
        ),
        (
            "Hello! Ask me about a function or class of Python's standard library, for example: "
            "What does len do?"
        ),
    ),
    (
        (
            "Who are you?", "What are you?", "What is your name?", "Are you a human?",
            "Tell me about yourself.", "Who made you?", "Which model are you?", "Introduce yourself.",
            "Are you ChatGPT?", "who is this?",
        ),
        (
            "I am the small demo model of subspec. I was trained on the documentation strings of Python's "
            "standard library, so you can ask me what a function does, for example os.path.join or "
            "json.dumps."
        ),
    ),
    (
        (
            "Thanks", "Thank you!", "Thanks a lot.", "Great, thanks", "Perfect.", "Nice, thank you.", "ok",
            "Cool.",
        ),
        "You are welcome! Ask me about another function whenever you like.",
    ),
    (
        (
            "Bye", "Goodbye!", "See you later.", "bye bye", "That is all.", "Good night.",
        ),
        "Goodbye! Come back when you have a question about Python's standard library.",
    ),
    (
        (
            "What can you do?", "Help", "What do you know?", "How can you help me?", "What can I ask you?",
            "help me", "What are you good at?", "What is subspec?",
        ),
        (
            "I can describe functions, methods and classes of Python's standard library, show their "
            "signatures, name their modules and give a short call. I cannot do much else, because I am a "
            "very small model."
        ),
    ),
)

_FOREIGN_NAMES = """
    numpy.array numpy.zeros pandas.DataFrame pandas.read_csv requests.get requests.post torch.tensor
    torch.nn.Linear flask.Flask django.db.models.Model matplotlib.pyplot.plot scipy.optimize.minimize
    sklearn.fit tensorflow.keras pytest.fixture numpy.linspace pandas.merge seaborn.heatmap click.command
    yaml.safe_load bs4.BeautifulSoup sqlalchemy.create_engine PIL.Image.open cv2.imread rich.print httpx.get
    pydantic.BaseModel fastapi.FastAPI transformers.AutoModel std::vector console.log System.out.println
    malloc printf fmt.Println
"""
FOREIGN_NAMES: tuple[str, ...] = tuple(_FOREIGN_NAMES.split())

OFF_TOPIC_FILL: dict[str, tuple[str, ...]] = {
    "thing": (
        "the moon", "winter", "my cat", "a dragon", "autumn leaves", "love", "the rain", "a lonely robot",
        "mountains", "my mother", "friendship", "the stars", "a river", "coffee", "an old house",
        "two brothers", "spring", "a brave mouse", "the city at night", "birds", "time travel",
        "a knight", "the desert", "summer", "a lost dog", "trees", "my birthday", "a pirate",
        "flowers", "the end of the world",
    ),
    "form": (
        "poem", "story", "song", "haiku", "short story", "joke", "letter", "essay", "speech", "limerick",
        "tale",
    ),
    "place": (
        "France", "Japan", "Peru", "Kenya", "Spain", "Canada", "India", "Egypt", "Norway", "Brazil", "Berlin",
    ),
    "dish": (
        "pizza", "soup", "pancakes", "bread", "curry", "a cake", "pasta", "salad", "rice", "an omelette",
    ),
    "person": (
        "Einstein", "Shakespeare", "Napoleon", "Marie Curie", "the president", "Mozart", "Cleopatra",
        "Newton",
    ),
    "language": (
        "French", "German", "Spanish", "Latin", "Japanese", "Russian", "Italian",
    ),
    "op": (
        "+", "-", "*", "/", "plus", "minus", "times", "divided by",
    ),
}

OFF_TOPIC: dict[str, tuple[str, ...]] = {
    "write": (
        "Write a {form} about {thing}.", "Write me a {form} about {thing}", "Tell me a {form} about {thing}.",
        "Can you write a {form} on {thing}?", "I would like a {form} about {thing}.",
        "Compose a {form} about {thing}.", "Make up a {form} with {thing} in it.", "Tell me a {form}.",
        "Write a long {form} about {thing}.",
    ),
    "sum": (
        "What is {a} {op} {b}?", "{a} {op} {b}", "{a}{op}{b}=", "Calculate {a} {op} {b}.",
        "How much is {a} {op} {b}?", "What's {a} {op} {b}", "Solve {a} {op} {b}.", "What is {a}{op}{b}?",
        "Compute {a} {op} {b}", "{a}{op}{b}?",
    ),
    "world": (
        "What is the capital of {place}?", "Where is {place}?", "Who was {person}?",
        "How do I get to {place}?", "What is the weather in {place}?", "How many people live in {place}?",
        "When was {person} born?", "Tell me about {place}.", "Who is {person}?", "What did {person} do?",
        "Is {place} nice in summer?", "What do you think about {thing}?", "Why is the sky blue?",
        "How far away is the sun?", "What day is it?", "What is the history of {place}?",
        "Explain quantum physics.", "Who won the match?", "What is love?",
    ),
    "home": (
        "How do I cook {dish}?", "Give me a recipe for {dish}.", "Give me a {dish} recipe", "I am hungry.",
        "What should I eat today?", "Plan a trip to {place}.", "I feel sad today.", "Recommend me a film.",
        "What should I wear in {place}?", "Should I buy a car?", "Help me find a job.",
        "How do I lose weight?", "What is a good book about {thing}?", "Give me three ideas for {thing}.",
        "I am bored.", "Sing for me.",
    ),
    "translate": (
        "Translate hello to {language}.", "How do you say {thing} in {language}?",
        "Say something in {language}.", "Translate this sentence into {language}: I like {dish}.",
        "What is {thing} in {language}?", "Do you speak {language}?", "Correct my {language}.",
    ),
    "foreign": (
        "What does {lib} do?", "Explain {lib}.", "What is {lib}?", "How do I use {lib}?",
        "Tell me about {lib}.", "{lib}?", "Show me an example of {lib}.", "What is {lib} for?",
    ),
    "program": (
        "Write a program that plays chess.", "Write a web server.", "Make a website about {thing}.",
        "Fix my code.", "Why does my program crash?", "Write a function that returns {a} times {b}.",
        "Build an app for {thing}.", "Debug this: x = {a}", "Write code that draws {thing}.",
        "Write a game about {thing}.",
    ),
}

OFF_TOPIC_REPLIES: dict[str, str] = {
    "write": (
        "I am sorry, I cannot write that: I am a small demo model and know only Python's standard library. "
        "You could ask me instead what these do: textwrap.wrap, string.Template, or random.choice."
    ),
    "sum": (
        "I am too small to calculate reliably. Python can do it for you: type the numbers at its prompt. I "
        "can tell you about helpers such as sum, divmod, math.sqrt and statistics.mean."
    ),
    "world": (
        "I do not know that. I was trained only on the documentation of Python's standard library. Ask me "
        "about a function, for example os.listdir or datetime.datetime.now."
    ),
    "home": (
        "I cannot help with that, sorry. My only subject is Python's standard library. A few things I do "
        "know: shutil.copy copies a file, time.sleep waits, and random.shuffle mixes a list."
    ),
    "translate": (
        "I only speak English and only about Python's standard library, so I cannot translate. You could "
        "ask me about str.encode, bytes.decode or str.casefold."
    ),
    "foreign": (
        "{lib} is not part of Python's standard library, so I do not know it. I can describe what comes "
        "with Python, such as json.loads, csv.reader or urllib.parse.urlparse."
    ),
    "program": (
        "I cannot write or repair whole programs. I can describe single functions of Python's standard "
        "library and show how a call looks. Try: What does subprocess.run do?"
    ),
}
