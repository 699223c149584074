"""Requirements I-III of the GIMLI paper (§2.4), decided on captured graphs."""
