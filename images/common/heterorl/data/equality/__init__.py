"""Do two answers say the same? `verdict.equal` decides; it imports sympy, so the worker of `answers` calls it.

    text --typography--> characters --tokens--> tokens --grammar--> values --verdict--> equal or not
                                                  |  words: what is a word, what a product of letters
                                                  |  units: dimensions, prefixes, count nouns
                                                  exact: when are two sympy expressions equal

What this grammar does not know (integrals, limits) is parsed by math-verify and compared here all the same.
"""
