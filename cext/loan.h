/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Mode bits lent: an ordinary user's daemon needs, of files and directories of the user's in the
 * upper, owner's bits that they lack, for what the kernel lets the user do all the same (chmod a
 * file in a directory that he cannot write; read a mark of a file that he cannot read). They are
 * lent for a while; several may need them at once, and nobody shall see them, or take back what
 * another still needs, or a chmod that came meanwhile. A cut in between leaves them set.
 *
 * Of this process, not of a tree. One mutex, a leaf, held over system calls that do not wait for
 * data. Root needs nothing lent: then nothing is locked. */
#ifndef UNIONFS_LOAN_H
#define UNIONFS_LOAN_H

#include "sys.h"

struct loan;

/* Has `bits` set in the mode of what is at `path`, until they are returned. *ret_loan is NULL where
 * there is nothing to lend: not ours, neither file nor directory, or not lacking. */
errint_t loan_take(const char *path, bool nofollow, mode_t bits, struct loan **ret_loan);
void loan_return(struct loan *l);

/* chmod(2), which outlasts what is lent. */
errint_t loan_set_mode(const char *path, mode_t mode);

/* fstatat(2), with the mode as it will be when all is returned. */
errint_t loan_stat(int dirfd, const char *name, int flags, struct stat *ret_st);

/* Calls fn; where that is denied (-EACCES), once more with `bits` lent. */
errint_t as_owner(const char *path, bool nofollow, mode_t bits, errint_t (*fn)(void *arg),
                  void *arg);

#endif
