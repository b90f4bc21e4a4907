"""Do the tokens of a dataset still look like those of its reference version?"""
