"""The words of the request language: synonyms and phrases, and what kind of token each is."""

from functools import cache

PHRASES: dict[str, str] = {
    # --- verbs
    "MERGE": "mixed|blended|fused|combined|"
    "combination of|a combination of|mixture of|a mixture of|a blend of|a mix of|bundle|weld|assemble|"
    "unify|amalgamate|make something from|build something from|build me something from|construct|create|turn into one|"
    "merge|combine|blend|fuse|mix|join|unite|compose|merging|put together|bring together|build|"
    "pair|marry|stitch together|one model out of|a model out of|one model of|one model from|composite of|"
    "composite from|make one of|merged",
    "ONLY": "only|just the|nothing but|exclusively",
    "NO": "no",
    "NOTHING": "nothing|none of them|anything|any of them|no models",
    "NOMERGE": "skip the merging|skip merging|leave the merging out|no need to merge|no merge at all|"
    "only route|just route|no merging|without merging|no merges|route only|do not merge anything",
    "OUT": "everything but|all but|all except|everything except|everyone but|every model but|don't need|do not need|"
    "dont need|need no|no use for|have no use for|"
    "throw away|scrap|strike|delete|forget about using|cut|cut out|lose the|"
    "do away with|not including|not counting|besides|nothing of|leave aside|save for|no need for|not interested in|"
    "leave out|leaves out|left out|take out|throw out|kick out|exclude|excluding|omit|remove|skip|ignore|"
    "without|except|except for|but not|but no|apart from|other than|minus|drop out|get rid of|discard|ditch",
    "OUTWORD": "out|behind|aside",
    "KEEP": "don't touch|do not touch|leave alone|keep|retain|preserve|hold on to",
    "LEAVE": "leave",
    "WHOLE": "behind the router|as a whole|on the side|to itself|by itself|by themselves|out of the merge|"
    "out of any merge|"
    "outside the merge|as a separate expert|as its own expert|standalone|stand alone|unmixed|unaltered|"
    "whole|as it is|as is|as they are|as it stands|unmerged|untouched|intact|on its own|on their own|alone|"
    "separate|separately|unchanged|in one piece|apart|a whole expert|whole expert|whole experts",
    "STAY": "stay|stays|remain|remains|is kept|be kept|are kept|is to stay",
    "MUST": "must|must be|should|should be|shall|has to|have to|needs to|is|are|be|was|were|may|ought to",
    "NOT": "dont|doesnt|isnt|cant|wont|shouldnt|mustnt|is not allowed to|are not allowed to|not allowed to|"
    "isn't allowed to|aren't allowed to|"
    "not|never|no longer|don't|do not|does not|doesn't|must not|mustn't|should not|shouldn't|may not|cannot|"
    "can't|can not|won't|will not|isn't|is not|without any|do never|shall not|shan't",
    "ADD": "throw in|bring|also add|take on board|toss in|plug in|add in|extend with|restore|re-add|readd|"
    "add|include|put|bring back|put back|take in|bring in|also take|also use|also merge|also include",
    "USE": "use|using|with|by|via|through|try|take|choose|pick|switch to|change to|go with|go for|let",
    "CALL": "call|name|rename|named|called|by the name of",
    "FORGET": "forget|forget about|never mind|nevermind|lift|drop the limit on|drop the protection|"
    "drop the protection of|remove the protection|remove the protection of|no longer protect|stop protecting",
    # --- what must hold
    "PROTECT": "protecting|preserve the score on|no loss on|no losses on|keep an eye on|must not lose on|"
    "may not lose on|hold on|without a loss on|without dropping on|keep the quality on|keep the score on|"
    "no regression on|no regressions on|no drop on|not at the expense of|not at the cost of|without sacrificing|"
    "protect|make sure|make sure that|ensure|ensure that|guarantee|guard|see to it that|be careful with|"
    "without losing|without hurting|without harming|don't let|do not let|must keep|do not lose|don't lose|"
    "must not lose|do not hurt|don't hurt|safeguard",
    "PREFER": "i care the most about|care the most about|care most for|"
    "prioritise|prioritize|prioritising|prioritizing|with priority on|priority on|priority to|priority for|"
    "give priority to|focus on|focusing on|with focus on|with a focus on|focus is on|concentrate on|emphasise|"
    "emphasize|with emphasis on|put emphasis on|emphasis on|weigh|weight|favour|favor|care most about|"
    "i care most about|mostly care about|i mostly care about|care more about|i care more about|what matters most is|"
    "what matters is|what counts is|what counts most is|most important is|the most important is|"
    "the most important task is|the main thing is|the priority is|my priority is|count",
    "MATTER": "matters most|matter most|matters more|matter more|matters|matter|most important|more important|"
    "as important|important|counts more|counts most|counts|comes first|come first|has priority|have priority|"
    "a priority|the priority|top priority|highest priority|crucial|essential|the most important|"
    "the most important one",
    "THAN": "than|as much as",
    "EQUALLY": "give every task the same weight|every task the same weight|the same weight for every task|"
    "the same weight|same weight|give all tasks the same weight|all tasks the same weight|"
    "weigh all tasks equally|count all tasks equally|all tasks equally|equal weights|weigh them equally|"
    "equally important|no priorities|all tasks count the same|same weight for all tasks|treat all tasks the same|"
    "weigh them all the same|weigh all tasks the same|all tasks matter the same|all tasks matter equally",
    "TOGETHER": "together|all together",
    "UNGUARD": "doesn't need protecting|doesnt need protecting|does not need protecting|does not need protection|"
    "doesn't need protection|needs no protection|need no protection|no longer needs protection|"
    "no longer needs protecting|no longer need protecting|don't need protecting|need not be protected|"
    "doesn't need protecting anymore|does not need protection any more",
    "SWAP": "swap|replace|exchange|trade|swap out|switch out",
    "DROP": "worse|be worse|drop|drops|dropping|get worse|gets worse|suffer|suffers|decline|declines|fall|falls|"
    "regress|regresses|"
    "degrade|degrades|lose|loses|worsen|go down|goes down|deteriorate|become worse|losing",
    "UNDER": "nothing above|nothing over|nothing beyond|nothing larger than|nothing bigger than|not above|"
    "no bigger|beneath|lower than|shorter than|not beyond|at maximum|no higher than|or less|or fewer|or smaller|"
    "fit in|fits in|fit into|keep within|must fit in|ceiling of|"
    "under|below|at most|no more than|not more than|less than|fewer than|smaller than|no bigger than|"
    "no larger than|not larger than|not bigger than|not exceed|not exceeding|within|max|maximum|up to|at the most|"
    "limit of|limited to|tops|cap of|capped at|budget of|not be larger than|not be bigger than|stay under|"
    "not be over|not over|in under|in less than|limit|smaller|no longer than|not longer than|not take longer than",
    "OVER": "over|above|at least|more than|no less than|not less than|bigger than|larger than|minimum|not under|"
    "no smaller than|not smaller than|greater than",
    "LIMIT": "priorities|task weights|"
    "size limit|limit on size|limit on the size|time limit|memory limit|disk limit|"
    "limit on time|limit on items|item limit|limit on the time",
    "ALIKE": "alike|similar|similarity|the same|identical",
    "THRESHOLD": "threshold|similarity threshold|cluster threshold|threshold of|threshold to",
    "VAGUE": "improve|improved|fancy|clever|fine|sensible|efficient|accurate enough|short|high quality|quality|"
    "powerful|robust|"
    "small|smaller one|good|better|best|nice|great|big|bigger|large|cheap|cheaper|smart|smarter|strong|"
    "stronger|"
    "strongest|optimal|reasonable|decent|suitable|right|proper|weak|weakest|worst|quicker|faster|light|tiny|smallest|"
    "biggest|largest|useful|interesting|bad|poor",
    "PACE": "fast|quick|accurate|balanced|fastest",
    "TRIES": "tries|try each|trials|trial|attempts|rounds|candidates|evaluations|merges|iterations|steps",
    "ITEMS": "items|item|questions|examples|samples|problems|documents",
    "SPLIT": "proxy|held-out|held out|heldout|test",
    "SEED": "seed|random seed",
    # --- how
    "ROUTER": "router|routing|gate|gates|gating",
    "NOUN": "operator|operators|strategy|strategies|method|methods|algorithm|recipe for merging|search|task|tasks",
    "ALWAYS": "keep whatever the merge gives|whatever the merge gives|keep whatever comes out|whatever comes out|"
    "no matter how it scores|take the merge no matter how it scores|i don't care about the score|"
    "i dont care about the score|i do not care about the score|"
    "in any case|no matter what|accept every merge|accept all merges|accept any merge|keep every merge|"
    "keep all merges|keep the merge|keep the merge in any case|accept always|always accept|accept everything|"
    "always keep the merge|unconditionally|whatever it scores",
    # --- serving, running, asking
    "EVALUATE": "check on|check it on|tested on|assess|assess on|rate|score it on|measured by|grade|grade on|"
    "use as tasks|the tasks are|judge it by|judge it on|try it on|examine on|evaluate it on|measure it on|"
    "evaluate|evaluate on|measure|measure on|judge|score|benchmark|test on|evaluated on|evaluating|"
    "judged by|judged on|measured on|score on|test it on|tasks are|add task|add tasks|add the task",
    "ALSO": "too|as well|also|additionally|as a further task|on top of that",
    "SERVE": "start a server|start a server for it|spin up a server|spin up an endpoint|run a server|spin it up|"
    "make it available|put it on port|put it up|start serving|go live|publish|open the endpoint|"
    "start the endpoint|start the server|make an endpoint|run it on port|serve that|have it served|and serve|"
    "serve|serving|host|deploy|bring up|put online|expose|put it online|bring it up|serve again",
    "HALT": "stop serving|shut down|stop the server|stop the endpoint|take it down|take down|bring down|stop it|stop",
    "PORT": "port",
    "MODELS": "what models are there|which models are there|list|list models|list the models|list all models|"
    "show the models|what is on the shelf|what have you got|show models|show me the models|what models do you have|"
    "which models do you have|what is there|"
    "what do you have|what is in the zoo|show the zoo|which models|what models|list the zoo|models available",
    "INSPECT": "inspect|tell me about|describe|details of|details on|more about|look at|information on|"
    "what do you know about|"
    "how many parameters has|how many parameters does|how many parameters do|how large is|what size is|what size does|"
    "how big is|what kind of model is|who is",
    "COMPARE": "how near are|closest|the closest|which are the closest|which are closest|most alike|"
    "most similar|which are most similar|similarities|similarity matrix|how different are|are alike|"
    "how related are|which belong together|what belongs together|clusters|"
    "compare|how similar are|how similar is|how alike are|similarity of|similarity between|how close are|"
    "difference between|how much alike are|are similar",
    "ROUTE": "which expert would answer|who would answer|who answers|route this|route this prompt|route the prompt|"
    "which model would answer|which expert answers|who gets|route|which model answers|who would get|where would|"
    "which expert gets|which model gets",
    "WHY": "what happened to|what happened with|what became of|where did|what about the fate of|justify|"
    "reason for|for which reason|what is wrong with|what was wrong with|"
    "why|how come|explain|explain why|what is the reason|for what reason|why was|why is|why were|why did",
    "COST": "what would it cost|what would that cost|what does it cost|what does that cost|how much would it cost|"
    "how much does it cost|how long would it take|how long does it take|how long will it take|cost|what if|"
    "how expensive|what would it take|how much memory|how much would it take|how much time|how long|costs",
    "EVIDENCE": "did it work|how much better|was it worth it|how good|what are the numbers|numbers|the numbers|"
    "show the table|how did it go|outcome|what came out|what did we gain|is it any good|compared with the best|"
    "evidence|results|result table|show the results|show results|how good is it|what did it gain|"
    "did it help|"
    "scores|show the evidence|what was gained|how did it do|how well does it do|is it better|the gain|show the scores|"
    "how good is the composite|what was the gain",
    "RECIPE": "recipe|the recipe|show the recipe|the draft|show the draft|draft|what have we got|settings|"
    "what we have so far|show me what we have so far|what do we have so far|where do we stand|so far|"
    "show settings",
    "STATUS": "what is happening|what's happening|what's running|what's going on|how long to go|how much longer|"
    "where are we|is it finished|are you done|is it ready|still running|anything running|"
    "is anything being served right now|is anything being served|what is served|what is being served|"
    "is anything served|is something served|"
    "status|what is running|how far|how far is it|progress|what is going on|is it running|is it done|"
    "is anything running|what are you doing|how is it going",
    "PLAN": "plan|show the plan|make a plan|dry run|plan it|what would you do|what would happen|show me the plan",
    "RUN": "let it run|make it so|begin|kick off|kick it off|off you go|fire away|let's go|get going|"
    "get started|compose it|build it|"
    "run|run it|go ahead|start|start it|do it|go|execute|launch|carry on|continue|resume|proceed",
    "CANCEL": "cancel|abort|cancel the run|stop the run|abort the run|cancel it|interrupt|halt the run",
    "SAVE": "keep a copy|dump|write it out|export it|store it|save this|save that|save it as|store|write to|"
    "save|save it|write it|write down|export the recipe|store the recipe|save the recipe|write the recipe",
    "UNDO": "never mind that|forget that|not that|take it back|un-do|previous|back to before|restore the last one|"
    "undo|take that back|revert|go back|undo that|back one step|scratch that",
    "ROLLBACK": "roll back|rollback|go back to the last one|back to the last composite|back to the previous one|"
    "roll back to the last one|the previous composite|back to the last one",
    "RESET": "back to the beginning|scrap all that|back to square one|from the beginning|back to the start|"
    "start from zero|"
    "start over|reset|from scratch|start again|begin again|start afresh|forget everything|clear",
    "HELP": "what can i type|what can i type here|i'm lost|i am lost|what should i say|what do i type|what now|"
    "what do you understand|what else can you do|what are my options|options|how do i|"
    "instructions|manual|"
    "help|what can you do|what can i say|what can i ask|how does this work|commands|usage|hello|hi",
    "TRAIN": "learn from|retraining|finetuning|fine-tuning|training run|lora training|rl|dpo|sft|"
    "train|fine-tune|finetune|fine tune|pretrain|pre-train|distill|distil|teach|retrain|rlhf",
    # --- lists
    "ALL": "all|everything|every model|all models|all the models|all of them|all of these|them all|"
    "the whole zoo|the lot|"
    "the entire zoo|whole zoo|every one|everyone|every single one|all seven|the whole|both|the rest|all others|"
    "the others|whole lot|all of it|every",
    "SOME": "some|a few|several|a couple of|a couple|one of them|some of them|a few of them|a few of the|some of the|"
    "two of them|three of them|any two|any three|a handful of|most of them|most",
    "PLURAL": "models|ones|experts|checkpoints|family|fine-tunes|finetunes|llms|specialists",
    "SINGULAR": "something like|variant|model|one|expert|checkpoint|fine-tune|llm|specialist|guy",
    # --- connectives
    "_AND": "and|as well as|plus|or|along with|together with|and also|and the|and then also",
    "_SEP": "once it is done|when it is done|when done|once done|when finished|then|but|and then|afterwards|"
    "after that|while|whereas|however|provided|provided that|so that|as long as|"
    "although|though|because|since|once",
    # --- what says nothing
    "_NOISE": "itself|themselves|anyway|anyways|project|this project|for this project|for my thesis|garbage|junk|"
    "rubbish|useless|rest is fine|the rest is fine|is fine|that is fine|fine by me|fine with me|is ok|is okay|"
    "single system|one system|single|system|network|one network|sent|request|requests|each request|to the right model|"
    "the right model|secondary|is secondary|everything else is secondary|the rest is secondary|over it|over them|"
    "they're|they are|it's|that's|i'm|we're|we'd|compare them by|hmm|mhm|on second thought|on second thoughts|i meant|"
    "meant|i mean|thing|must finish|finish|each from|from each|laptop|machine|my laptop|my machine|has only|only has|"
    "group models|group them|if|"
    "about|the whole thing|whole thing|wait|see|what happens|see what happens|"
    "a|an|the|please|pls|could|can|could you|can you|would you|would|you|i|we|us|me|my|our|want|i want|like|"
    "i would like|i'd like|need|to|of|for|from|into|in|on|at|as|it|its|them|they|these|those|this|that|which|who|"
    "do|does|will|so|now|instead|actually|maybe|perhaps|thanks|thank you|thank|okay|ok|well|hey|just|"
    "give|give me|show|show me|make|made|get|have|has|if|possible|result|the result|composite|final|final model|"
    "parameters|parameter|params|weights in total|in total|total|size|more|each|per task|per model|a task|"
    "whichever is better|"
    "whatever is better|whichever wins|whichever works better|whichever is best|the better of the two|new|let us|"
    "let's|cluster|cluster by|group|compare by|models by|predict|them by|yes|sorry|hm|oh|back|again|still|all right|"
    "whichever|there|here|with a|with the|between them|between|level|endpoint|server|engine|up|time|memory|"
    "limit to|set|set to|set the|i think|what about|how about|what|between the|zoo|going|running|done|"
    "long|alright|kind|type|version|operation|mode|at all|any|much|very|really|also the|want to|both of|"
    "using the",
}  # fmt: skip
"""Phrases by the token they become; a token with an underscore is the lexicon's own."""

VALUED: dict[str, dict[str, str]] = {
    "LEVEL": {
        "block": "block level|blockwise|block-wise|blocks|block|layer level|whole layers|layerwise|layer-wise",
        "ffn": "ffn level|ffn|ffn-wise|feed-forward level|feed-forward|feedforward|mlp level|moe|sparse moe|mlps",
        "model": "model level|whole models|model-wise",
    },
    "SIGNAL": {
        "logits": "logits|what they predict|predictions|what they say",
        "hidden": "hidden states|hidden|activations|representations",
        "deltas": "deltas|task vectors|task vector|differences to the base",
        "weights": "by weights|weights",
    },
    "METHOD": {
        "task_arithmetic": "task arithmetic|task-arithmetic|task_arithmetic",
        "dare_ties": "dare ties|dare-ties|dare_ties|dareties",
        "dare_linear": "dare linear|dare-linear|dare_linear|dare",
        "model_stock": "model stock|model-stock|modelstock|model_stock",
        "evolution": "evolution|evolutionary|evolutionary search|cma-es|evolve|evolutionary algorithm|"
        "evolutionary merging",
        "coefficient": "coefficient|coefficients|coefficient search|grid search|grid|search the coefficients",
        "similarity": "similarity search|by similarity",
        "simmerge": "simmerge|sim-merge|sim merge|the predictor|predictor",
        "bandit": "bandit|the bandit",
        "average": "average|averaging|plain average|uniform average|averages|greedy average|mean",
        "linear": "linear|lerp|linear average|linear merge",
    },
    "KIND": {
        "mlp": "mlp|neural router",
        "prompt": "prompt router|prompt-initialised|prompt-initialized|prompt initialised",
        "prompt_glue": "prompt_glue|prompt-glue|glue router",
        "oracle": "oracle",
        "random": "random router|random routing",
    },
    "SIZE": {"1000000": "one million|a million|one million parameters", "1000000000": "one billion|a billion"},
    "TIMES": {
        "2": "twice|double|twice as|twice as much|doubly",
        "3": "triple|thrice",
    },
    "TIME": {
        "60": "an hour|one hour|1 hour",
        "30": "half an hour",
        "1": "a minute|one minute",
        "15": "a quarter of an hour",
    },
}
"""Phrases that are another way to write a value of a recipe."""

UNITS: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("k", "thousand"), ("SIZE", 1e3)),
    **dict.fromkeys(("m", "million", "millions", "mio", "mn"), ("SIZE", 1e6)),
    **dict.fromkeys(("b", "bn", "billion", "billions"), ("SIZE", 1e9)),
    **dict.fromkeys(("parameters", "params", "parameter"), ("SIZE", 1.0)),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), ("TIME", 1 / 60)),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), ("TIME", 1.0)),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), ("TIME", 60.0)),
    **dict.fromkeys(("gb", "gib", "gig", "gigs", "gigabyte", "gigabytes"), ("MEMORY", 1.0)),
    **dict.fromkeys(("mb", "mib", "megabyte", "megabytes"), ("MEMORY", 1e-3)),
    **dict.fromkeys(("%", "percent"), ("PERCENT", 1e-2)),
    **dict.fromkeys(("times", "fold"), ("TIMES", 1.0)),
}  # fmt: skip
"""Units after a number: the token, and what one of it is (minutes, GB, parameters, times)."""

NUMBERS = {
    name: value
    for value, name in enumerate("two three four five six seven eight nine ten eleven".split(), start=2)  # noqa: SIM905
} | {"twelve": 12, "fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "hundred": 100}  # fmt: skip


@cache
def phrases() -> dict[tuple[str, ...], tuple[str, str]]:
    """Return all phrases as words, with the token each becomes and its value."""
    from composer.merging.operators import OPERATORS
    from composer.merging.strategies import STRATEGIES
    from composer.serving.engines import ENGINES

    found: dict[tuple[str, ...], tuple[str, str]] = {}
    for registry, token in ((OPERATORS, "METHOD"), (STRATEGIES, "METHOD"), (ENGINES, "ENGINE")):
        for name in registry.names():
            if name not in ("fixed", "none", "passthrough", "similarity"):
                found[(name,)] = found[tuple(name.split("_"))] = found[(name.replace("_", "-"),)] = (token, name)
    for token, said in PHRASES.items():
        found |= {tuple(one.split()): (token, one) for one in said.split("|")}
    for token, values in VALUED.items():
        found |= {tuple(one.split()): (token, value) for value, said in values.items() for one in said.split("|")}
    return found
