"""Every key of every recipe, with its unit and default. A recipe imports this file and overrides a few dozen lines.

    python -m jdmdr.pipeline --config configs/RECIPE.py --workdir DIR --config.KEY=VALUE

A None may be given a number on the command line. `configs/RECIPE.py:smoke` shrinks any recipe to a minute or two.
"""

import pathlib

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jdmdr.types import UserError

TINYPEDIA = str(pathlib.Path(__file__).resolve().parents[1] / "third_party" / "tinypedia")


def get_config():
    c = ConfigDict()
    c.name = "dmdr"  # the trained system's name in metrics, runs and the model card
    c.seed = 0  # root of every random choice

    c.parallel = ConfigDict()  # how a run lies on its devices and processes (docs/launch.md); changes no result
    c.parallel.fsdp = 1  # devices that parameters and optimiser state are split over; 1: each device holds all of them
    c.parallel.rules = (("", "fsdp"),)  # (regex on the parameter's path, replicate | fsdp), ...: first match wins
    c.parallel.heartbeat = 100  # seconds without a sign of life after which a process is given up, and the run stops
    c.parallel.stall = 900  # seconds that a training step may take before the stacks of all threads are printed; 0: off

    c.data = ConfigDict()
    c.data.root = TINYPEDIA  # directory with corpus/, topics/, qrels/ and perhaps train/ (docs/data.md)
    c.data.langs = ""  # comma-separated; empty: all that are found
    c.data.fields = "title,text"  # of a passage's row, that are its text
    c.data.separator = " "  # between the fields
    c.data.splits = ""  # NAME=TOPICS:QRELS:CORPUS, ... (docs/evaluation.md); empty: all that are found, own corpus
    c.data.valid_share = (
        0.1  # share of the articles whose train queries are held out: they choose checkpoint and hybrid
    )

    c.data.cloze_per_lang = 20_000  # passages, chosen at random, that inverse-cloze pairs are made of

    c.data.pairs = ""  # a working directory of jdmdr.pretrain, whose weak pairs the shares `pairs_share` are drawn from

    c.tokenizer = ConfigDict()
    c.tokenizer.name = ""  # Hugging Face name or directory; empty: the encoder's own, or one trained on the corpus
    c.tokenizer.vocab_size = 16_000  # pieces of a tokenizer trained on the corpus
    c.tokenizer.as_in = ""  # 2.3.0 | 2.8.0: RoBERTa's as in that transformers, for ANCE | STAR, ADORE (docs/models.md)

    c.encoder = ConfigDict()
    c.encoder.name = ""  # Hugging Face name or directory; empty: the from-scratch encoder (token vectors, no layers)
    c.encoder.passage_name = ""  # of another checkpoint of the same shape, for the passages' tower
    c.encoder.width = 512  # embedding width of the from-scratch encoder
    c.encoder.pooling = ""  # cls | mean | last; empty: what the checkpoint says
    c.encoder.normalize = True  # L2-normalise embeddings: cosine similarity instead of dot product
    c.encoder.new_vocabulary = (
        False  # keeps the checkpoint's layers under a tokenizer trained on the data (docs/kdr.md)
    )
    c.encoder.layers = 0  # first layers kept of a checkpoint; 0: all
    c.encoder.projection = 0  # width of a linear head behind the pooling; 0: none, or the checkpoint's own
    c.encoder.projection_bias = False  # for a new head
    c.encoder.projection_norm = False  # for a new head: a LayerNorm behind it
    c.encoder.towers = (
        ""  # tied | untied: one set of parameters, or one a side; empty: tied unless the checkpoint's are not
    )
    c.encoder.query_prompt = ""  # before every query, e.g. "query: "
    c.encoder.passage_prompt = ""  # before every passage, e.g. "passage: "
    c.encoder.query_length = 64  # tokens, special tokens included
    c.encoder.passage_length = 256  # tokens, special tokens included
    c.encoder.chunks = (
        1  # above 1: a passage is up to so many chunks of passage_length tokens, and its best one counts (MaxP)
    )
    c.encoder.chunk_specials = True  # every chunk has special tokens; False: they are cut out of one long sequence
    c.encoder.window = 0  # of sliding-window attention: neighbours that a token sees; 0: what the checkpoint has
    c.encoder.dtype = ""  # float32 | bfloat16 of the matmuls; empty: bfloat16 on GPU and TPU, float32 on CPU
    # in training; None: what the checkpoint says. On a GPU 0 lets cuDNN compute attention, without padding
    # (docs/performance.md)
    c.encoder.attention_dropout = placeholder(float)
    c.encoder.remat = False  # recompute activations in the backward pass: less memory, about a third more time

    c.warmup = training()  # before mining: in-batch negatives on training pairs and inverse-cloze pairs
    c.warmup.epochs = 0.0  # 0: the encoder as it is loaded
    c.warmup.passages_per_query = 1
    c.warmup.cloze_share = 0.5
    c.warmup.objective.mode = "none"

    c.mine = ConfigDict()
    c.mine.retrievers = (
        "warmup,bm25"  # the ensemble: the encoder that training starts from, BM25; more in jdmdr/retrievers.py
    )
    c.mine.fusion = "rrf"  # rrf | zscore | minmax | concat (of encoders alone)
    c.mine.weights = ()  # one weight a retriever; empty: equal, for concat 1 / sigma
    c.mine.pool = "corpus"  # corpus | positives: what may be a negative; positives: what is one of another query
    c.mine.depth = 200  # candidates a query
    c.mine.index = "faiss"  # faiss | exact
    c.mine.factory = "Flat"  # faiss index factory string
    c.mine.negatives = 30  # negatives kept a query; short queries are filled up
    c.mine.least = placeholder(int)  # None: fill up; a number: do not, and train without the queries that have fewer
    c.mine.sample = "best"  # best | uniform: which of the candidates that the filters leave
    c.mine.texts = True  # writes them with their texts too, negatives/train_aug/LANG.jsonl: disk by texts x negatives

    c.cross_encoder = ConfigDict()  # reads query and passage together; filters.cross_encoder compare its scores
    c.cross_encoder.name = ""  # Hugging Face name or directory of a sequence classifier; empty: off
    c.cross_encoder.label = ""  # of several labels, the one that means relevant
    c.cross_encoder.depth = 100  # candidates a query that it scores
    c.cross_encoder.length = 512  # tokens of query and passage together, special tokens included

    c.filters = ConfigDict()  # rules over the candidates; None: off. Scores are the first dense retriever's
    c.filters.near_duplicate = (
        0.9  # drop a candidate whose word-trigram Jaccard with a positive is this or more; 1: only copies
    )
    c.filters.skip = placeholder(int)  # drop the first n candidates
    c.filters.depth = placeholder(int)  # keep the first n candidates
    c.filters.max_score = placeholder(float)  # keep scores below
    c.filters.absolute_margin = placeholder(float)  # keep scores below s+ - m, s+ the lowest positive's
    c.filters.relative_margin = placeholder(float)  # keep scores below s+ - m |s+|
    c.filters.percent_of_positive = placeholder(float)  # keep scores below p s+
    c.filters.answers = ""  # drop what holds an answer of the query: file of jdmdr.questions, {lang} in it; empty: off
    c.filters.cross_encoder = ConfigDict()  # the same over the cross-encoder's probabilities of being relevant
    c.filters.cross_encoder.max_score = placeholder(float)
    c.filters.cross_encoder.absolute_margin = placeholder(float)
    c.filters.cross_encoder.relative_margin = placeholder(float)
    c.filters.cross_encoder.percent_of_positive = placeholder(float)

    c.llm = ConfigDict()  # the language model that judges and writes; any OpenAI-compatible server (docs/llm.md)
    c.llm.base_url = ""  # e.g. http://localhost:8000/v1; empty: no model, the rule filters stand in
    c.llm.model = ""  # as the server names it
    c.llm.api_key_from = "OPENAI_API_KEY"  # environment variable that holds the server's key; unset: none is sent
    c.llm.cache = ""  # directory of the log of all answers, which runs may share; empty: llm/ in the working directory
    c.llm.concurrency = 16  # calls at a time
    c.llm.requests_per_minute = placeholder(int)  # None: no limit
    c.llm.timeout = 120.0  # seconds that one request may take
    c.llm.retries = 5  # repetitions of a request that failed for a reason that may pass, with growing random pauses
    c.llm.max_failures = 20  # calls given up in a row that stop the run
    c.llm.max_calls = placeholder(int)  # requests, over all that the log holds; None: no limit; 0: replay the log
    c.llm.max_tokens = placeholder(int)  # of prompts and replies together, over all that the log holds
    c.llm.max_cost = placeholder(float)  # in the currency of the prices, over all that the log holds
    c.llm.price_in, c.llm.price_out = 0.0, 0.0  # of a million tokens of prompts, and of replies
    c.llm.extra_body = ""  # JSON object sent along, e.g. {"chat_template_kwargs": {"enable_thinking": false}}

    c.judge = ConfigDict()  # which candidates answer their query, by the model of `llm` (docs/llm.md)
    c.judge.langs = ""  # comma-separated; empty: all; the others are left to the rule filters
    c.judge.queries = placeholder(int)  # training queries a language, chosen by a hash; None: all
    c.judge.depth = 40  # candidates a query that the filters leave, the best; asking ends once mine.negatives are kept
    c.judge.sampling = ((0.4, 0.7), (0.6, 0.8), (0.8, 0.9), (0.4, 0.8))  # (temperature, top_p), one a vote
    c.judge.max_tokens = 512  # of a reply
    c.judge.passage_chars = 4000  # of a passage that are shown
    c.judge.reference = True  # show a known positive to compare with
    c.judge.keep_max_label = 0  # keep candidates labelled so at most: 0 irrelevant, 1 partly, 2 highly relevant
    c.judge.unjudged = "drop"  # drop | keep what got no valid reply
    c.judge.use_qrels = True  # keep what the data judge irrelevant without a call
    c.judge.keep_below = placeholder(float)  # p: keep what scores below p s+ without a call; scores as in `filters`
    c.judge.score_rules = False  # let the score rules of `filters` act first; they stand in where there is no judge
    c.judge.calibrate = 50  # judged pairs of each kind a language that tell how far to trust the judge; 0: none
    c.judge.least_precision, c.judge.least_recall = 0.8, 0.5  # of "keep" on them, below which a language gets a warning

    c.expand = ConfigDict()  # short queries are topped up with the passages of new ones that the model writes
    c.expand.rounds = 3  # new queries written for a short query, one after another while it is short; 0: none
    c.expand.depths = (40, 100, 200)  # hits of a new query to judge; then, still short, of the old and the new ones
    c.expand.model = ""  # that writes, as the server names it, e.g. one tuned by jdmdr.llm.tune; empty: llm.model
    c.expand.temperature, c.expand.top_p = 0.7, 0.9  # of sampling
    c.expand.passage_chars = 4000  # of the positive that are shown
    c.expand.summary_tokens, c.expand.query_tokens = 256, 128  # of a reply, at most
    c.expand.query_length = 64  # tokens of a new query, special tokens included; a longer one is not searched for

    c.audit = ConfigDict()
    c.audit.rows = 20  # candidates a language in the sheet for people to judge; 0: none

    c.topics = ConfigDict()
    c.topics.method = "kmeans"  # kmeans | embed | fasttext
    c.topics.examples = ""  # embed: file of lines `label TAB text` (docs/dmdr.md), e.g. configs/topics.tsv
    c.topics.yahoo, c.topics.dbpedia = "", ""  # fasttext: the two classifiers, .bin or .ftz
    c.topics.rule = "yahoo_first"  # fasttext: yahoo_first | confidence
    c.topics.mapping = "paper"  # of DBpedia's labels: paper | fixed (ministers are politics, schools education ...)
    c.topics.least_probability = 0.35  # embed, and fasttext by confidence: below it a passage is Others
    c.topics.clusters = 12  # of spherical k-means over the positives' embeddings
    c.topics.iterations = 50  # at most
    c.topics.scope = "dataset"  # dataset | language: over what one set of clusters is made

    c.train = training()

    c.distill = ConfigDict()  # a teacher of one language, students of any (docs/kdr.md)
    c.distill.teacher = ""  # an encoder as in mine.retrievers, or vectors:DIR, made elsewhere
    c.distill.source = "en"  # the language that the teacher reads
    c.distill.cache = (
        ""  # directory of its vectors, which runs may share; empty: teacher-cache/ in the working directory
    )
    c.distill.bitext = ""  # distill_bitext: files of translations and directories of them, comma-separated
    c.distill.split = "train"  # of such a directory's files NAME.SPLIT.tsv
    c.distill.parallel = False  # passages and queries of equal ids in data.root are translations too
    c.distill.langs = ""  # distill_scores: languages of the queries, comma-separated; empty: all that there are
    c.distill.translations = ""  # directory of LANG.tsv, qid TAB query; data.root's queries of equal qids count too
    c.distill.shown = "ko"  # languages beside the source whose translations the report pictures, the first that has any
    c.distill.translate = ""  # languages that the model of `llm` translates the queries to, comma-separated

    c.refresh = ConfigDict()  # negatives mined again by the model that trains (docs/ance.md)
    c.refresh.mode = "off"  # off | inline (the trainer stops and mines) | async (a second process mines) | replay
    c.refresh.every = placeholder(int)  # steps between two inline refreshes; None: train.checkpoint_every
    c.refresh.poll = 100  # steps between two looks for a new version
    c.refresh.chunks = 1  # a refresh mines for one part in so many of the queries, in turn; the others keep theirs
    c.refresh.max_age = placeholder(int)  # steps that negatives may be old; None: three times train.checkpoint_every
    c.refresh.on_stale = "warn"  # warn | wait | fail: what a run does whose negatives are older
    c.refresh.keep = 3  # newest versions that stay on disk; 0: all, for a replay
    c.refresh.replay = ""  # replay: the working directory whose versions are taken, at the steps of that run
    c.refresh.start = True  # async: the trainer starts the second process; False: you do, on any host
    c.refresh.devices = ""  # async: CUDA_VISIBLE_DEVICES of the process that the trainer starts

    c.weights = ConfigDict()  # language and topic weights of the loss (docs/dmdr.md)
    c.weights.a = 0.45  # mean language weight
    c.weights.b = 0.40  # mean topic weight
    c.weights.gamma_a = 0.5  # exponent of the language share: 0 constant, 1 inverse share
    c.weights.gamma_b = 0.5  # exponent of the topic share
    c.weights.sign = -1  # -1: rare languages and topics weigh more; 1: the share itself
    c.weights.topic_scope = "language"  # language | dataset | batch: over what topic shares are counted
    c.weights.inherit = False  # a negative takes its query's topic instead of its own

    c.encode = ConfigDict()
    c.encode.dimensions = 0  # first dimensions kept of the trained encoder, in search and export; 0: all
    c.encode.passages = ""  # vectors of the passages made elsewhere, instead of encoding: a workdir, or a directory of
    # LANG.passages.npy and .txt (docs/data.md); the encoder that training starts from must have made a workdir's
    c.encode.dtype = "float16"  # of the stored embeddings
    c.encode.shard_rows = 100_000  # passages a file: what a killed run loses at most

    c.evaluate = ConfigDict()
    c.evaluate.depth = 100  # hits a query
    c.evaluate.measures = ""  # beside ndcg@10, recall@100, mrr@10 and map, e.g. msmarco_mrr@10,recall(rel=2)@1000
    c.evaluate.hybrid = "minmax"  # fusion of the trained encoder with BM25: rrf | zscore | minmax
    c.evaluate.bootstrap = 1000  # samples of the 95 % interval

    c.pretrain = pretraining()  # of an encoder on weak pairs (docs/clir.md); no part of the pipeline

    c.rerank = (
        reranking()
    )  # of judged or retrieved candidates, by cross-validation (docs/clir.md); no part of the pipeline

    c.spans = answering()  # extractive question answering on SQuAD's JSON (docs/clir.md); no part of the pipeline

    c.tune = ConfigDict()  # instruction tuning of an LLM (docs/llm_tuning.md); no part of the pipeline
    c.tune.model = ""  # directory of a Hugging Face checkpoint: Qwen3, Llama 3 or Gemma 3
    c.tune.instructions = ""  # file of English rows {instruction, input, output}: a JSON list, or an object a line
    c.tune.pattern = r"summar|main idea|key points|tl;dr"  # regex: which instructions, whatever its case
    c.tune.translations = ""  # file of such rows in other languages, with lang; empty: the model of `llm` translates
    c.tune.langs = "ar,bn,en,es,fa,fi,fr,hi,id,ja,ko,ru,sw,te,th,zh"
    c.tune.samples = 1000  # instructions over all languages, of each equally many
    c.tune.length = 2048  # tokens of an example; the input of a longer one is cut
    c.tune.rank, c.tune.alpha = 8, 16.0  # of the adapters on all linear layers
    c.tune.epochs = 5.0  # passes over the instructions
    c.tune.steps = placeholder(int)  # optimiser updates; None: as many as the epochs take
    c.tune.batch_size = 16  # examples a step, over all devices
    c.tune.chunk_rows = 4  # examples computed at a time on one device: the memory
    c.tune.learning_rate = 1e-3  # peak; falls to 0 as a cosine
    c.tune.warmup_share = 0.1  # of the steps, linear rise
    c.tune.clip = 1.0  # global gradient norm; 0: off
    c.tune.dtype = ""  # float32 | bfloat16 of the model; empty: bfloat16 on GPU and TPU, float32 on CPU
    c.tune.remat = True  # recompute activations in the backward pass: less memory, about a third more time
    c.tune.checkpoint_every = 50  # steps
    c.tune.shard_gb = 5.0  # of a weights file of the tuned model

    return c.lock()


def pretraining():
    """The keys of query language modelling and relevance ranking: those of a training run, and where pairs come from."""
    p = training()
    p.sources = ""  # KIND:DIR, ... of articles: articles | parallel | corpus | xquad_r (jdmdr/articles.py)
    p.min_words = 50  # of a section; shorter ones are left out
    p.monolingual = False  # also pairs a sentence with the rest of its own section
    p.valid_share = 0.1  # share of the articles held out: alignment P@1 is measured on them
    p.align = ConfigDict()  # which sections of two articles belong together: the weighted mean of
    p.align.cosine = 1.0  # the cosine of their heads by `encoder`,
    p.align.items = 1.0  # the overlap of the concepts they link to,
    p.align.position = 0.5  # and their relative places
    p.align.threshold = 0.6  # below it a pair is dropped
    p.align.encoder = ""  # Hugging Face name or directory; empty: without the cosine
    p.scratch = ConfigDict()  # the transformer that is trained where encoder.name is empty
    p.scratch.layers, p.scratch.width, p.scratch.heads, p.scratch.ffn = 4, 256, 4, 1024
    p.query_length = 64  # tokens of a query
    p.length = 512  # tokens of query and document together, special tokens included
    p.mask_rate = 0.3  # of the candidates; at least one of a row
    p.mask_mode = "query"  # where candidates are: query | document | mixed
    p.negatives = 1  # documents of a query beside its positive
    p.objective = ConfigDict()
    p.objective.qlm_weight, p.objective.rr_weight = 1.0, 1.0  # 0: without it
    p.objective.bi_weight = 0.0  # of a contrastive loss in the batch, query and document read apart; not in the paper
    p.objective.temperature = 0.05  # of that loss: divides the scores
    p.objective.rr_loss = "pointwise"  # pointwise | pairwise_logistic | pairwise_hinge | listwise
    p.objective.margin = 1.0  # of pairwise_hinge
    p.objective.schedule = "joint"  # joint: one update on the sum | alternate: an update for each, by turns
    p.objective.tied = True  # the LM head shares the word vectors; False: a matrix of its own
    p.policy = "language_only"  # a batch is of one pair of languages
    p.batch_size, p.learning_rate, p.decay, p.warmup_share, p.weight_decay = 32, 2e-5, "linear", 0.05, 0.01
    p.keep = "last"  # last | best, by alignment P@1
    return p


def reranking():
    """The keys of a re-ranker's fine-tuning over folds: those of a training run, and where queries and documents are."""
    r = training()
    r.topics, r.qrels, r.corpus = "", "", ""  # files; {query} and {document} in them stand for the languages
    r.run = ""  # candidates of a query: a TREC run's hits, bm25, article (all of the relevant's); empty: what is judged
    r.query_langs, r.document_langs = "", ""  # comma-separated, each with each; empty: the paths name no language
    r.monolingual = False  # also queries and documents of one language
    r.fields = "title,text"  # of a document's row, that are its text
    r.depth = 100  # candidates of a query taken from the run
    r.folds = ""  # JSON file {"f1": [qid, ...], ... "f5": [...]}; empty: by a hash
    r.length = 512  # tokens of query and document together, special tokens included
    r.negatives = 1  # documents of a query beside a relevant one
    r.tune_top = 3  # layers that train, the last ones, with the head; 0: everything
    r.objective = ConfigDict()
    r.objective.rr_weight = 1.0
    r.objective.rr_loss = "pointwise"  # pointwise | pairwise_logistic | pairwise_hinge | listwise
    r.objective.margin = 1.0  # of pairwise_hinge
    r.batch_size, r.learning_rate, r.decay, r.warmup_share, r.clip = 16, 2e-5, "constant", 0.0, 0.0
    r.epochs, r.checkpoint_every = 20.0, 100
    return r


def answering():
    """The keys of a reader of spans: those of a training run, and where questions are."""
    s = training()
    s.train = ""  # SQuAD JSON, comma-separated files
    s.test = ""  # SQuAD JSON; {context} and {question} in it stand for the languages
    s.langs = ""  # comma-separated, of the tests: contexts of each with questions of each
    s.data = ""  # a data root that the JSON is made of instead; languages empty: all of it
    s.train_split, s.test_split = "train", "test"  # of its topics; ONE-OTHER: what ONE has and OTHER lacks
    s.train_langs = ""  # of its training questions, each with contexts of its own language
    s.length = 384  # tokens of question and window together, special tokens included
    s.query_length = 64  # tokens of a question
    s.overlap = 128  # tokens that two windows of a context share
    s.max_answer = 64  # tokens of an answer
    s.epochs, s.batch_size, s.learning_rate = 2.0, 16, 3e-5
    s.keep = "last"
    return s


def training():
    """The keys of one training run; `warmup` and `train` each have them."""
    t = ConfigDict()
    t.epochs = 4.0  # passes over the training queries
    t.steps = placeholder(int)  # optimiser updates; None: as many as the epochs take
    t.batch_size = 24  # queries in the global batch, over all devices
    t.query_length = placeholder(int)  # tokens that training reads of a query; None: encoder.query_length
    t.passage_length = placeholder(int)  # and of a passage; None: encoder.passage_length
    t.passages_per_query = 8  # 1 positive and the rest hard negatives; 0 for adore, which finds its passages itself
    t.replay_share = 0.0  # distill_bitext: share of the steps on queries and passages, with distill_scores
    t.cloze_share = 0.0  # share of the steps on inverse-cloze pairs (title or sentence -> rest of the passage)
    t.pairs_share = 0.0  # share of the steps on the weak pairs of data.pairs
    t.policy = "stratified"  # stratified | round_robin | uniform | random | language_only | topic_only
    t.lang_temp = 1.0  # 1: languages by their size; 0: all alike

    t.objective = ConfigDict()
    t.objective.name = "contrastive"  # contrastive | pairwise (STAR, ANCE) | adore | distill_scores | distill_bitext
    t.objective.mode = "example"  # contrastive: where the weights act: none | example | negative | literal_trainer
    t.objective.negatives = "all"  # pairwise: all of the batch | own: all listed ones, no positives | query: its own
    t.objective.top_k = 200  # adore: passages that a query retrieves in the step
    t.objective.metric_cut = placeholder(int)  # adore: ranks beyond it count nothing; to be given, top_k as a rule
    t.objective.metric = "mrr"  # adore: what a swap of two passages would change: mrr | ndcg
    t.objective.missing = "append_if_none"  # adore: positives that were not retrieved: append_if_none | append_all
    t.objective.scope = "own"  # adore: a query searches the collection of its language (own) or all
    t.objective.index_dtype = "bfloat16"  # adore: of the vectors on the devices: bfloat16 | float32 | int8 (rescored)
    t.objective.teacher_temperature = 0.05  # distill_*: divides the teacher's scores
    t.objective.form = "kl"  # distill_scores: kl | margin_mse
    t.objective.candidates = (
        "batch"  # distill_scores: a query's scores over the batch, or over its own list: batch | own
    )
    t.objective.cross_weight = 1.0  # distill_bitext: scores between sources and translations; 0: off, as all weights
    t.objective.self_weight = 0.5  # distill_bitext: scores within each language
    t.objective.anchor_weight = 0.0  # distill_bitext: scores between the teacher's vectors and the student's
    t.objective.mse_weight = 0.0  # distill_*: squared differences of the teacher's vectors and the student's
    t.objective.contrastive_weight = 0.0  # distill_*: the contrastive loss on positives, or translations
    t.objective.teacher_projection = (
        False  # distill_*: learns a matrix for the two lines above the last where widths differ
    )
    t.objective.temperature = 0.05  # divides the scores; where it starts if it is learned
    t.objective.learn_temperature = False  # its logarithm is the parameter objective/log_temperature
    t.objective.min_temperature, t.objective.max_temperature = 0.005, 1.0  # bounds of a learned one
    t.objective.dimensions = ()  # Matryoshka: shorter embeddings that count too, e.g. (64, 128); the whole always does
    t.objective.dimension_weights = ()  # one a dimension of the line above; empty: 1 each, as the whole has

    t.trainable = ""  # regex on the encoder's parameters that train; empty: all, or with LoRA the projection head alone
    t.lora = ConfigDict()  # low-rank adapters, merged when training ends
    t.lora.rank = 0  # 0: off
    t.lora.alpha = 16.0  # what an adapter adds counts alpha / rank
    t.lora.target = "attention/(query|value)/kernel$|(^|/)embedding$"  # regex on the paths of the adapted matrices
    t.lora.dropout = 0.0  # share of an adapter's inputs left out, drawn each step

    t.optimiser = "adamw"  # adamw | lamb (as STAR and ANCE have it: jdmdr/lamb.py)
    t.learning_rate = 2e-5  # peak
    t.learning_rates = ()  # ((regex on the parameter's path, peak), ...): first match wins
    t.warmup_share = 0.1  # of the steps, linear rise
    t.horizon = placeholder(int)  # steps that warmup_share and decay are counted over; None: those of the run
    t.decay = "linear"  # linear (to 0) | constant
    t.weight_decay = 0.0
    t.no_decay = ""  # regex on the paths of parameters that do not decay, e.g. "bias$|_norm/scale$"
    t.clip = 1.0  # global gradient norm; 0: off

    t.chunk_rows = 8  # sequences of like length that attention pads to one width: fewer pad less, and compile longer
    t.grad_cache = 0  # sequences that a device encodes at a time, twice, to save memory (docs/scaling.md); 0: all, once
    t.max_profiles = 3  # compiled batch shapes, one more for batches that fit none
    t.checkpoint_every = 500  # steps between validations, each saved
    t.keep = "best"  # what the run ends with: best (of the validations, the start included) | last
    t.valid_pool = 100_000  # passages a language that validation searches: positives, negatives, random ones
    t.log_every = 10  # steps
    t.max_skipped = 20  # non-finite updates in a row that stop the run
    return t


def smoke(config, arg, others=()):
    """Shrinks `config` for `:smoke`: two languages of tinypedia, the from-scratch encoder, a few steps.

    Any other `arg` is refused; `others` are what may stand behind the recipe's colon besides.
    """
    if arg not in ("", "smoke"):
        raise UserError(f"{arg!r} behind the colon is not known; there are: {', '.join([*others, 'smoke'])}")
    if arg:
        with config.unlocked():
            config.data.root, config.data.langs = TINYPEDIA, "en,sw"
            config.tokenizer = get_config().tokenizer
            config.tokenizer.vocab_size = 2000
            towers, config.encoder = config.encoder.towers, get_config().encoder
            config.encoder.towers = towers
            config.encoder.width, config.encoder.query_length, config.encoder.passage_length = 64, 32, 96
            config.warmup.steps = config.train.steps = 6
            config.distill.langs = config.distill.translate = ""
            for section in (config.warmup, config.train):
                section.batch_size, section.checkpoint_every, section.max_profiles, section.log_every = 16, 3, 1, 1
                section.objective.top_k = 10
                if section.objective.metric_cut:
                    section.objective.metric_cut = 10
                section.query_length = section.passage_length = None
            config.judge.queries, config.judge.depth, config.judge.calibrate = 3, 4, 2
            config.expand.rounds, config.expand.depths = 1, (8,)
            config.refresh.poll = 1
            config.mine.depth, config.evaluate.bootstrap, config.topics.clusters = 40, 100, 4
    return config


def smoke_pretraining(config, arg):
    """Shrinks the pretraining of `config` for `:smoke`: three languages of tinypedia, a transformer of two layers, a few steps."""
    if arg not in ("", "smoke"):
        raise UserError(f"{arg!r} behind the colon is not known; there is: smoke")
    if arg:
        with config.unlocked():
            config.encoder.name, config.tokenizer.vocab_size = "", 1000
            p = config.pretrain
            p.sources = f"parallel:{TINYPEDIA}@en+es+sw"
            p.min_words, p.length, p.query_length = 10, 96, 32
            p.scratch.layers, p.scratch.width, p.scratch.heads, p.scratch.ffn = 2, 32, 2, 64
            p.steps, p.batch_size, p.checkpoint_every, p.max_profiles, p.log_every = 6, 8, 3, 1, 1
    return config
