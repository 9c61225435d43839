"""Names that the demo model learns, and wording for docstrings that do not read as an answer."""

from __future__ import annotations

_MODULES = """
    builtins os os.path sys json re math random itertools functools collections pathlib datetime time shutil
    subprocess string statistics heapq bisect copy glob hashlib csv threading asyncio contextlib typing
    operator textwrap struct tempfile zipfile tarfile urllib.parse urllib.request socket logging argparse
    decimal fractions uuid secrets base64 pickle sqlite3 enum dataclasses inspect traceback queue
    collections.abc io fnmatch gzip html platform calendar array weakref difflib pprint getpass hmac zlib
    configparser concurrent.futures warnings timeit gc importlib mimetypes filecmp
"""
MODULES: tuple[str, ...] = tuple(_MODULES.split())

_CLASS_MEMBERS = """
    str list dict set bytes tuple int float collections.Counter collections.deque collections.OrderedDict
    pathlib.Path pathlib.PurePath datetime.datetime datetime.date threading.Thread threading.Event queue.Queue
    logging.Logger argparse.ArgumentParser string.Template sqlite3.Connection sqlite3.Cursor zipfile.ZipFile
    subprocess.Popen contextlib.ExitStack
"""
CLASS_MEMBERS: tuple[str, ...] = tuple(_CLASS_MEMBERS.split())

# Names that a newcomer does not ask about. Without them the small model has more capacity for the others.
SKIPPED = (
    r"os\.(W[A-Z]|sched_|set|get(e|g|pg|pp|pr|res|s|u|x)(?!nv)|posix_|spawn|exec|l[a-z]*chown|pidfd"
    r"|eventfd|major|minor|makedev|memfd|p(read|write|athconf|utenv)|[a-z]*_result"
    r"|f[a-z]+(?<!fspath)(?<!fsync)(?<!fork)$|tc|ctermid|confstr|lockf|login|openpty|[a-z]*xattr|register"
    r"|wait[a-z0-9]+|initgroups|copy_file|device|mkfifo|mknod|sendfile|splice|stat_|sysconf|ttyname|umask"
    r"|uname_|writev|readv|dup|nice|pipe2|close_?range|killpg)"
    r"|asyncio\.(Abstract|Base|Buffered|.*Watcher|.*Transport|.*Protocol|Default|.*Handle|Selector"
    r"|.*child_watcher|.*policy|open_unix|start_unix|wrap_future|iscoroutine|isfuture|ensure)"
    r"|typing\.(Supports|ParamSpec.|.*View|no_type|clear_|get_over|.*TypeVarT|ByteString|Async|Match"
    r"|Pattern|reveal|is_typed|dataclass_tr)"
    r"|socket\.(CMSG|if_|.*_fds|getserv|getproto|sethost|has_|SocketType|fromfd)"
    r"|inspect\.(Block|classify|findsource|format|getabs|getargs|getargv|getattr|getblock|getclass"
    r"|getclosure|getcorout|getframe|getgener|getinner|getouter|getlineno|getmembers_|indent|isasync"
    r"|isgetset|ismember|isdata|ismethod.|walk|get_ann|getcallargs)"
    r"|sys\.(.*asyncgen|.*coroutine|.*int_max|.*dlopen|.*switch|.*audit|call_|is_final|getalloc|.*hook)"
    r"|platform\.(java|mac|libc|freed|python_[brc]|system_)|.*clock_(get|set)|.*_ns$|time\.(pthread|tzset)"
    r"|logging\.(Buffering|.*Factory|.*LoggerClass|makeLog|Logger\.(call|find|make|has|handle))"
    r"|threading\.(.*profile|.*trace|.*Daemon|.*Name)|random\.(Random|.*variate|get|set)"
    r"|calendar\.(.*HTML|.*Locale)|builtins|(copyright|credits|license|help|exit|quit)$"
    r"|zipfile\.(main|Pyzip)|tarfile\.main|timeit\.main"
)

# Docstrings open with one of these in the imperative; answers need them in the third person.
_VERBS = """
    return get set create remove convert execute decode encode wait log open change test call read close
    insert copy add print perform make clear generate compare write split check parse run format compute
    update rename find put extract partition compile duplicate force kill register iterate enable serialize
    determine wrap replace guess extend strip import abort fork truncate initialize translate delete expand
    join normalize handle deserialize escape choose pop push schedule start combine clean retrieve resolve
    disable construct concatenate pad report obtain evaluate round ensure pass exit scan calculate restore
    shuffle drop apply delay unpack estimate divide transform merge submit use ask cast mark fill collapse
    pack connect filter associate do adapt decorate work compress decompress fetch examine recalculate prompt
    issue freeze unfreeze reload discard seed append reverse sort move reset block indicate commit load roll
    group try manage measure count turn build interact terminate provide yield show search match substitute
    acquire release raise send receive draw dump give look render save store announce arrange walk swap keep
    capitalize tell define configure assert flush unquote quote rotate represent shift restrict derive
    allocate notify fold unescape
"""
VERBS: frozenset[str] = frozenset(_VERBS.split())

# Drawn several times as often as the rest.
_FAMOUS = """
    abs all any bin bool bytes callable chr complex dict dir divmod enumerate eval exec filter float frozenset
    format getattr globals hasattr hash hex id input int isinstance issubclass iter len list locals map max
    min next object oct open ord pow print property range repr reversed round set setattr slice sorted
    staticmethod classmethod str sum super tuple type vars zip ValueError KeyError IndexError TypeError
    StopIteration str.capitalize str.casefold str.center str.count str.encode str.endswith str.find str.format
    str.index str.isalpha str.isdigit str.islower str.isspace str.isupper str.join str.ljust str.lower
    str.lstrip str.partition str.replace str.rfind str.rjust str.rsplit str.rstrip str.split str.splitlines
    str.startswith str.strip str.swapcase str.title str.translate str.upper str.zfill str.removeprefix
    str.removesuffix list.append list.clear list.copy list.count list.extend list.index list.insert list.pop
    list.remove list.reverse list.sort dict.clear dict.copy dict.fromkeys dict.get dict.items dict.keys
    dict.pop dict.popitem dict.setdefault dict.update dict.values set.add set.clear set.difference set.discard
    set.intersection set.issubset set.pop set.remove set.union set.update bytes.decode bytes.hex
    int.bit_length os.chdir os.chmod os.cpu_count os.getcwd os.getenv os.getpid os.kill os.listdir os.makedirs
    os.mkdir os.remove os.rename os.replace os.rmdir os.scandir os.stat os.symlink os.system os.unlink
    os.urandom os.walk os.path.abspath os.path.basename os.path.commonpath os.path.dirname os.path.exists
    os.path.expanduser os.path.getsize os.path.isabs os.path.isdir os.path.isfile os.path.islink os.path.join
    os.path.normpath os.path.realpath os.path.relpath os.path.split os.path.splitext sys.exit sys.getsizeof
    sys.getrecursionlimit sys.setrecursionlimit sys.getrefcount sys.intern json.dump json.dumps json.load
    json.loads re.compile re.escape re.findall re.finditer re.fullmatch re.match re.search re.split re.sub
    math.ceil math.comb math.cos math.dist math.exp math.factorial math.floor math.fsum math.gcd math.hypot
    math.isclose math.isnan math.lcm math.log math.log10 math.log2 math.perm math.pow math.prod math.sin
    math.sqrt math.tan math.trunc random.choice random.choices random.randint random.random random.randrange
    random.sample random.seed random.shuffle random.uniform random.gauss itertools.accumulate itertools.chain
    itertools.combinations itertools.count itertools.cycle itertools.groupby itertools.islice
    itertools.permutations itertools.product itertools.repeat itertools.starmap itertools.takewhile
    itertools.zip_longest itertools.dropwhile itertools.pairwise functools.cache functools.cached_property
    functools.lru_cache functools.partial functools.reduce functools.total_ordering functools.wraps
    functools.singledispatch collections.ChainMap collections.Counter collections.OrderedDict
    collections.defaultdict collections.deque collections.namedtuple collections.Counter.most_common
    collections.deque.appendleft collections.deque.popleft pathlib.Path pathlib.Path.exists pathlib.Path.glob
    pathlib.Path.mkdir pathlib.Path.read_text pathlib.Path.write_text datetime.date datetime.datetime
    datetime.timedelta datetime.datetime.now datetime.datetime.strptime time.monotonic time.perf_counter
    time.sleep time.strftime time.time time.localtime time.gmtime shutil.copy shutil.copy2 shutil.copyfile
    shutil.copytree shutil.disk_usage shutil.make_archive shutil.move shutil.rmtree shutil.which
    subprocess.Popen subprocess.call subprocess.check_call subprocess.check_output subprocess.run
    string.Template string.capwords statistics.mean statistics.median statistics.mode statistics.stdev
    statistics.variance heapq.heapify heapq.heappop heapq.heappush heapq.merge heapq.nlargest heapq.nsmallest
    bisect.insort bisect.bisect bisect.bisect_left bisect.bisect_right bisect.insort_left bisect.insort_right
    copy.copy copy.deepcopy glob.glob glob.iglob hashlib.new hashlib.md5 hashlib.sha256 csv.DictReader
    csv.DictWriter csv.reader csv.writer threading.Event threading.Thread threading.Timer
    threading.current_thread threading.Semaphore asyncio.create_task asyncio.gather asyncio.run asyncio.sleep
    asyncio.wait_for asyncio.Queue asyncio.to_thread contextlib.closing contextlib.contextmanager
    contextlib.suppress contextlib.redirect_stdout contextlib.ExitStack typing.Any typing.Optional
    typing.Union typing.NamedTuple typing.cast typing.Protocol operator.itemgetter operator.attrgetter
    textwrap.dedent textwrap.fill textwrap.indent textwrap.shorten textwrap.wrap struct.pack struct.unpack
    struct.calcsize tempfile.mkdtemp tempfile.mkstemp tempfile.NamedTemporaryFile tempfile.TemporaryDirectory
    tempfile.gettempdir zipfile.ZipFile urllib.parse.quote urllib.parse.unquote urllib.parse.urlencode
    urllib.parse.urljoin urllib.parse.urlparse urllib.parse.parse_qs socket.create_connection
    socket.gethostbyname socket.gethostname logging.basicConfig logging.getLogger logging.info logging.warning
    argparse.ArgumentParser argparse.ArgumentParser.parse_args decimal.Decimal fractions.Fraction uuid.uuid1
    uuid.uuid4 secrets.token_hex secrets.token_bytes secrets.token_urlsafe secrets.choice base64.b64decode
    base64.b64encode pickle.dump pickle.dumps pickle.load pickle.loads sqlite3.connect sqlite3.Cursor.execute
    enum.Enum enum.IntEnum enum.auto dataclasses.asdict dataclasses.dataclass dataclasses.field
    inspect.getsource inspect.signature inspect.isfunction traceback.print_exc traceback.format_exc
    queue.Queue queue.PriorityQueue io.StringIO io.BytesIO fnmatch.fnmatch gzip.open html.escape
    platform.system pprint.pprint getpass.getpass timeit.timeit difflib.get_close_matches hmac.compare_digest
    gc.collect calendar.isleap calendar.monthrange weakref.ref importlib.import_module warnings.warn
    zlib.compress zlib.decompress concurrent.futures.ThreadPoolExecutor
"""
FAMOUS: frozenset[str] = frozenset(_FAMOUS.split())

# Well-known names whose docstring opens with a signature, a sketch or nothing that reads as an answer.
REWORDED: dict[str, str] = {
    "super": "Return a proxy object that passes method calls on to a parent or sibling class.",
    "type": "Return the type of an object. With three arguments, create a new class instead.",
    "zip": (
        "Combine several iterables and yield tuples with one item from each. It stops when the shortest "
        "iterable is exhausted."
    ),
    "open": (
        "Open a file and return a stream. The mode tells whether it is opened for reading, writing or "
        "appending; 'r' for reading text is the default."
    ),
    "bytes": (
        "Construct an immutable sequence of bytes from an iterable of integers, a buffer or an encoded "
        "string."
    ),
    "dict": (
        "Create a dictionary, which maps keys to values, from a mapping, from key/value pairs or from "
        "keyword arguments."
    ),
    "dict.items": "Return a set-like view of the dictionary's (key, value) pairs.",
    "dict.keys": "Return a set-like view of the dictionary's keys.",
    "dict.values": "Return a view of the dictionary's values.",
    "dict.copy": "Return a shallow copy of the dictionary.",
    "dict.update": (
        "Add the keys and values of another mapping or iterable of pairs to the dictionary, overwriting "
        "existing keys."
    ),
    "max": (
        "Return the biggest item of an iterable, or the largest of two or more arguments. A default can be "
        "given for an empty iterable."
    ),
    "min": (
        "Return the smallest item of an iterable, or the smallest of two or more arguments. A default can "
        "be given for an empty iterable."
    ),
    "dir": (
        "Return an alphabetized list of the attribute names of an object. Without an argument, it returns "
        "the names in the current scope."
    ),
    "vars": "Return the __dict__ attribute of an object. Without an argument, it is equivalent to locals().",
    "pow": "Compute base to the power exp. With a third argument, it returns the power modulo that number.",
    "os.getpid": "Return the current process id.",
    "os.walk": (
        "Walk a directory tree and yield, for each directory, a tuple of its path, its folder names and its "
        "file names."
    ),
    "os.path.commonpath": "Return the longest common sub-path of a sequence of path names.",
    "random.random": "Return a random floating point number between 0.0 and 1.0, with 1.0 excluded.",
    "secrets.choice": "Choose a random element from a non-empty sequence, suited for cryptographic use.",
    "time.gmtime": (
        "Convert seconds since the Epoch to a time tuple expressing UTC. When seconds is not passed in, it "
        "converts the current time instead."
    ),
    "time.localtime": (
        "Convert seconds since the Epoch to a time tuple expressing local time. When seconds is not passed "
        "in, it converts the current time instead."
    ),
    "datetime.date": "Represent a calendar date with year, month and day.",
    "datetime.datetime": "Represent a date and a time of day, optionally with a time zone.",
    "csv.DictReader": "Read rows of a CSV file as dictionaries, whose keys come from the header row.",
    "csv.DictWriter": "Write dictionaries as rows of a CSV file; fieldnames gives the order of the columns.",
    "functools.cached_property": (
        "Turn a method into a property whose value is computed once and then cached."
    ),
    "argparse.ArgumentParser.parse_args": (
        "Parse the command line arguments and return them as attributes of a namespace."
    ),
    "hmac.compare_digest": "Compare two strings or bytes in a way that does not leak timing information.",
    "weakref.ref": "Create a weak reference to an object, which does not keep the object alive.",
    "csv.reader": "Return an iterator over the rows of a CSV file; each row is a list of strings.",
    "csv.writer": "Return a writer object that turns rows of values into delimited lines of a CSV file.",
    "copy.copy": "Make a shallow copy of an arbitrary Python object: a new container with the same items.",
    "copy.deepcopy": "Make a deep copy of an arbitrary Python object, copying the objects inside it as well.",
    "itertools.repeat": (
        "Create an iterator which returns the object for the specified number of times. If not specified, "
        "it returns the object endlessly."
    ),
    "collections.defaultdict": (
        "Build a dict subclass that calls a default factory without arguments to produce a new value when a "
        "key is not present."
    ),
    "collections.ChainMap": (
        "Group multiple dicts (or other mappings) together to create a single, updateable view."
    ),
    "shutil.which": "Find the path of a command on the PATH, or return None if there is no such file.",
    "random.gauss": (
        "Return a random number of the Gaussian distribution; mu is the mean, and sigma is the standard "
        "deviation."
    ),
    "datetime.timedelta": (
        "Represent the difference between two datetime values in days, seconds and microseconds."
    ),
    "os.makedirs": (
        "Create a leaf directory and all intermediate ones, like mkdir for a whole path. If the target "
        "directory already exists, raise an OSError if exist_ok is False."
    ),
    "dict.pop": (
        "Remove a key and return its value. If the key is not found, return the default if given; "
        "otherwise, raise a KeyError."
    ),
    "datetime.datetime.strptime": "Parse a string according to a format and return a new datetime object.",
    "functools.lru_cache": (
        "Cache the results of a function, dropping the least recently used ones. If maxsize is set to None, "
        "the cache can grow without bound."
    ),
    "functools.cache": "Cache the results of a function without a size limit. Sometimes called memoize.",
    "functools.total_ordering": (
        "Fill in the missing ordering methods of a class; it is used as a class decorator."
    ),
    "functools.wraps": (
        "Copy name and docstring of the wrapped function to its wrapper; it is used as a decorator."
    ),
    "functools.singledispatch": (
        "Transform a function into a generic function, which can have different behaviours depending upon "
        "the type of its first argument."
    ),
    "concurrent.futures.ThreadPoolExecutor": "Run calls asynchronously in a pool of threads.",
    "math.gcd": "Calculate the greatest common divisor of integers.",
    "math.lcm": "Calculate the least common multiple of integers.",
    "math.hypot": "Calculate the Euclidean distance from the origin to a point, the length of a hypotenuse.",
    "threading.Semaphore": (
        "Manage a counter of release() calls minus acquire() calls, plus an initial value; acquire() blocks "
        "while the counter is zero."
    ),
    "hashlib.new": "Create a hash object for the named algorithm, optionally initialized with data.",
    "urllib.parse.quote": "Replace reserved and special characters of a URL part by %XX escapes.",
    "tempfile.mkdtemp": (
        "Create and return a unique temporary directory. The caller is responsible for deleting it."
    ),
    "tempfile.mkstemp": (
        "Create and return a unique temporary file as a pair (fd, name). The caller is responsible for "
        "deleting it."
    ),
    "contextlib.contextmanager": (
        "Turn a generator function into a context manager for the with statement; it is used as a decorator."
    ),
    "time.monotonic": "Return the time of a clock in seconds that cannot go backward.",
    "time.perf_counter": "Return the time of a performance counter in seconds, for benchmarking.",
    "traceback.print_exc": "Print the current exception with its traceback, to standard error by default.",
    "traceback.format_exc": "Return the current exception with its traceback as a string.",
    "asyncio.sleep": "Wait for a given time in seconds, letting other coroutines run meanwhile.",
    "enum.auto": "Provide an appropriate value for an Enum member, usually the next integer.",
    "timeit.timeit": "Measure how long it takes to run a statement many times.",
    "pathlib.Path": (
        "Represent a filesystem path, with methods that do system calls such as exists, glob and read_text."
    ),
    "pathlib.Path.exists": "Test whether this path exists.",
    "typing.Optional": "Mark a type as possibly None: Optional[X] is equivalent to Union[X, None].",
    "typing.Union": "Combine types: Union[X, Y] means either X or Y.",
    "math.comb": "Count the ways to choose k items from n items without repetition and without order.",
    "math.perm": "Count the ways to choose k items from n items without repetition and with order.",
    "list.reverse": "Reverse the order of the list's items in place and return None.",
    "list.insert": "Insert an object before the given index of the list.",
    "property": (
        "Turn methods into a managed attribute with a getter and, optionally, a setter and a deleter."
    ),
    "itertools.chain": (
        "Return an iterator over the elements of the first iterable, then of the next, until all iterables "
        "are exhausted."
    ),
    "shutil.copytree": (
        "Copy a directory tree recursively and return the destination directory. With dirs_exist_ok, the "
        "destination may already exist."
    ),
}
