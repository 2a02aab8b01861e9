"The command `egrpo`."
